"""minuwsgi: an application server after uWSGI's model, in one file of Python's standard library.

TODO map
"""
import collections
import errno
import gc
import io
import math
import mmap
import os
import select
import signal
import socket
import sys
import time

__version__ = '0.1'


# ---------------------------------------------------------------------------------------------
# 1. Options and the INI dialect
#
# uWSGI's configuration is one flat list of settings (name, value, where it stands), from the
# environment (UWSGI_*), from INI files and from the command line. Three steps make a Config of it:
# Settings gathers the list (files include files; if and for blocks choose and repeat lines);
# Settings.expand() fills in $(ENV), @(file) and %(name); configure() looks each name up in one table
# and converts its value. All that is wrong is told at once, with file and line.

class ConfigError(Exception):
    """A mistake in the configuration; its text says where, what and what to do."""


BOOLEANS = {'true': True, 'yes': True, 'on': True, 'false': False, 'no': False, 'off': False, '': True}


def flag(value):
    """true or false"""
    return BOOLEANS.get(value.lower(), value != '0')    # as in uWSGI: what doesn't say no means yes


def number(value):
    """a whole number"""
    if value.lower() in BOOLEANS:
        return 0                                        # as uWSGI's atoi(); configure() says so
    if not value.isdecimal():
        raise ValueError
    return int(value)


def positive(value):
    """a whole number greater than 0"""
    if number(value) < 1:
        raise ValueError
    return int(value)


def octal(value):
    """an octal mode such as 660"""
    mode = 0o666 if value == '1' or BOOLEANS.get(value.lower()) else int(value, 8)
    if not 0 <= mode <= 0o777:
        raise ValueError
    return mode


def filename(value):
    """a path"""
    return value


def word(value):
    """a name or an address"""
    return value


def network(value):
    """an address or a network such as 10.0.0.0/8"""
    from ipaddress import ip_network
    return ip_network(value, strict=False)


def anything(value):
    """any text"""
    return value


# Each row: names (the first is ours, the others are accepted, -x is the short form), converter,
# default (a tuple where the option may be repeated and its values gather), meaning. Parser,
# defaults, --help and the README's table come from here. A line of its own is a heading.
OPTIONS = (
    'Application',
    ('module wsgi -w', word, None, 'import it: package.module or package.module:callable'),
    ('wsgi-file file', filename, None, 'run it from a Python file'),
    ('callable', word, 'application', "its name in there, where `module` doesn't say"),
    ('mount', anything, (), '/prefix=module:callable or /prefix=file.py'),
    ('manage-script-name', flag, False, 'move the longest mount that fits from PATH_INFO to SCRIPT_NAME'),
    ('chdir', filename, None, 'go to this directory first'),
    ('pythonpath pp python-path', filename, (), 'put this directory in front of sys.path'),
    ('virtualenv home venv pyhome -H', filename, None, 'run with the Python of this virtual environment'),
    ('env', anything, (), 'NAME=value for the application'),
    ('lazy-apps lazy', flag, False, 'load the application in each worker, not once before the fork'),
    'Sockets',
    ('socket uwsgi-socket -s', word, (), 'speak the uwsgi protocol here: path, host:port, [v6]:port, @abstract'),
    ('http-socket http', word, (), 'speak HTTP/1.1 here'),
    ('chmod-socket chmod -C', octal, None, 'mode of unix sockets (default 660; without a value 666)'),
    ('chown-socket', word, None, 'owner of unix sockets: user or user:group'),
    ('umask', octal, None, 'umask of the server and the application'),
    ('listen -l', positive, 1024, 'how many connections may wait'),
    ('vacuum', flag, False, 'remove unix sockets and the pidfile at the end'),
    ('socket-timeout -z', positive, 4, 'seconds without progress until a client is given up'),
    ('http-timeout', positive, 60, 'seconds that an idle or slow client may take where no worker waits'),
    ('limit-post', number, 0, 'the largest request body in bytes (0: any)'),
    ('trust-proxy', network, (), 'believe X-Forwarded-For and -Proto from this address, or network 10.0.0.0/8'),
    'Static files',
    ('static-map', anything, (), '/prefix=directory or file: serve what is there, before the application'),
    ('static-map2', anything, (), '/prefix=directory, in which the prefix is a directory too'),
    ('check-static', anything, (), 'serve what is in this directory'),
    ('static-index', anything, (), 'the file for a directory, such as index.html'),
    ('static-expires', anything, (), 'PATTERN SECONDS, such as *.css 3600: how long browsers may keep it'),
    ('static-safe', anything, (), 'symbolic links may point into this directory'),
    'Processes',
    ('master -M', flag, True, '`false`: no fork, one process that serves, for a debugger'),
    ('processes workers -p', positive, 1, 'how many workers'),
    ('threads', positive, 1, 'how many requests a worker serves at once'),
    ('offload-threads offload-thread', number, 0, 'threads in a worker that finish large responses (at least 1)'),
    ('worker-reload-mercy reload-mercy', positive, 60, 'seconds that a worker has to finish before it is killed'),
    ('die-on-term', flag, True, '`false`: SIGTERM reloads, as in uWSGI 2.0'),
    ('uid', word, None, 'user to become when the sockets are bound'),
    ('gid', word, None, 'group to become'),
    ('pidfile', filename, None, "write the master's pid here"),
    ('daemonize -d', filename, None, 'go to the background, log to this file'),
    ('logto', filename, None, 'log to this file'),
    ('disable-logging -L', flag, False, 'no log line for each request'),
    'Configuration',
    ('ini', filename, (), 'read this file, or file:section'),
    ('set -S', anything, (), 'NAME=value: an option, or a variable for %(NAME)'),
    ('strict', flag, False, 'an unknown option stops the start'),
    ('show-config', flag, False, 'print each line and what becomes of it, and exit'),
    ('check', flag, False, 'look for all that would stop a start, load the application, exit'),
)

# uWSGI's options that need no switch here: names, reason. A * stands for any end.
NOT_NEEDED = (
    ('need-app', 'a start without an application fails'),
    ('enable-threads threads-stacksize thread-stacksize', "the application's threads just run"),
    ('single-interpreter -i', 'there is one interpreter'),
    ('thunder-lock', 'the kernel wakes one worker for a connection'),
    ('buffer-size -b http-buffer-size max-vars -v', 'a request head may have 64 KiB'),
    ('ignore-sigpipe ignore-write-errors disable-write-exception write-errors-*',
     'a client that leaves is no error'),
    ('close-on-exec close-on-exec2', 'no socket is inherited by what the application starts'),
    ('no-orphans', 'workers end when the master dies'),
)
# uWSGI's options that aren't supported: names, what to use instead.
NOT_SUPPORTED = (
    ('https* ssl-* sni*', 'let nginx speak TLS in front'),
    ('emperor* vassal*', 'one systemd unit for each site'),
    ('mule* spooler* spooler-*', 'a worker of its own, such as celery, rq or a systemd unit'),
    ('cache* add-cache-item', 'nginx, redis or memcached'),
    ('route* error-page-*', "nginx's location and rewrite"),
    ('cron* unique-cron', 'a systemd timer or cron'),
)


class Option:
    """A row of OPTIONS."""

    def __init__(self, names, convert, default, meaning):
        names = names.split()
        self.names = [name for name in names if name[0] != '-']
        self.short = [name for name in names if name[0] == '-']
        self.name, self.attribute = names[0], names[0].replace('-', '_')
        self.convert, self.default, self.meaning = convert, default, meaning


ROWS = [Option(*row) for row in OPTIONS if type(row) is tuple]
BY_NAME = {name: option for option in ROWS for name in (*option.names, *option.short)}


def fate(name):
    """(fate, remark) of an option's name: what becomes of a line with it."""
    if name in BY_NAME:
        return 'used', ''
    for kind, table in (('always', NOT_NEEDED), ('unsupported', NOT_SUPPORTED)):
        for names, remark in table:
            for pattern in names.split():
                if name == pattern or pattern[-1] == '*' and name.startswith(pattern[:-1]):
                    return kind, remark
    return 'unknown', ''


class Setting:
    """One line of the configuration: name, value as expanded, where it stands, its fate and a remark."""

    def __init__(self, name, value, where):
        self.name, self.value, self.where = name, value, where
        self.fate, self.remark = fate(name)


CONDITIONS = {
    'env': lambda settings, what, value: os.environ.get(what) == value if value is not None else what in os.environ,
    'opt': lambda settings, what, value: any(s.name == what and value in (None, s.value) for s in settings.all),
    'file': lambda settings, what, value: os.path.isfile(what),
    'dir': lambda settings, what, value: os.path.isdir(what),
    'directory': lambda settings, what, value: os.path.isdir(what),
    'exists': lambda settings, what, value: os.path.exists(what),
    'hostname': lambda settings, what, value: socket.gethostname() == what,
    'plugin': lambda settings, what, value: what in ('python', 'python3'),
    'reload': lambda settings, what, value: RELOADED in os.environ,
}
RELOADED = 'MINUWSGI_RELOAD'            # the variable that hands state to the new image (part 10)


class Settings:
    """The list of all settings, in the order in which they apply."""

    def __init__(self):
        self.all = []
        self.block = None               # inside if or for: (items, the lines gathered so far)
        self.last_ini = None
        self.warnings = []

    def add(self, name, value, where):
        """Take one line: a directive acts at once, a setting is kept."""
        if self.block is not None and not name.startswith('end'):
            if block_kind(name):
                raise ConfigError(f'{where}: {name} within another block: uWSGI has no nested blocks')
            self.block[1].append((name, value, where))
        elif name in ('endif', 'end-if', 'endfor', 'end-for', 'end'):
            self.end_block()
        elif block_kind(name):
            self.block = self.chosen(name, value, where), []
        elif name in ('ini', 'include', 'inherit', 'config'):
            self.read_ini(self.fill(value), where)
        elif name in ('set', 'set-ph', 'set-placeholder'):
            key, _, value = value.partition('=')
            self.add(key.strip(), value.strip(), where)
        else:
            self.all.append(Setting(name, value, where))

    def chosen(self, name, value, where):
        """The items for which the lines of a block are repeated: none or one for an if."""
        value = self.fill(value)
        kind, what = block_kind(name)
        if kind == 'for':
            if what == 'glob':
                import glob
                return sorted(glob.glob(value))
            if what == 'readline':
                with open(value) as file:
                    return [line.rstrip('\r\n') for line in file]
            return [str(i) for i in range(int(value))] if what == 'times' else value.split()
        negative = what.startswith('not-')
        what = what[4:] if negative else what
        if what not in CONDITIONS:
            raise ConfigError(f'{where}: unknown condition {name}')
        subject, equals, wanted = value.partition('=')
        if CONDITIONS[what](self, subject.strip(), wanted.strip() if equals else None) == negative:
            return []
        return [os.environ.get(subject.strip(), '') if what == 'env' and not negative else subject.strip()]

    def end_block(self):
        items, lines = self.block or ((), ())
        self.block = None
        for item in items:
            for name, value, where in lines:
                self.add(name.replace('%(_)', item), value.replace('%(_)', item), where)

    def read_ini(self, name, where):
        """Take the section [uwsgi] of a file, or another: file:section, :section (of the last file)."""
        file, section = name, 'uwsgi'
        if not os.path.exists(name) and ':' in name:
            file, _, section = name.rpartition(':')
        file = self.last_ini = file or self.last_ini
        if any(w.startswith(f'{file}:{section}:') for w in where.split(' < ')):
            raise ConfigError(f'{where}: {file} includes itself')
        try:
            with open(file, encoding='utf-8-sig', errors='surrogateescape', newline='') as lines:
                lines = lines.read().split('\n')
        except (OSError, TypeError) as error:
            raise ConfigError(f"{where}: can't read {name}: {error.strerror if file else 'no file before it'}") from None
        found, inside = [], False
        for i, line in enumerate(lines, 1):
            line = line.strip(' \t\r')
            if '%' in line:
                line = expand_magic(line, file, section)
            if line[:1] == '[':
                found.append(line[1:].partition(']')[0])
                inside = found[-1] == section
            elif inside and line and line[0] not in ';#':
                key, _, value = line.partition('=')
                self.add(key.strip(' \t'), value.strip(' \t'), f'{file}:{i}')
        if self.block is not None:
            self.warnings.append(f'{file}: a block has no end; it ends with the file')
            self.end_block()
        if section not in found:
            other = ', '.join(f'[{s}]' for s in dict.fromkeys(found)) or 'no section at all'
            self.warnings.append(f'{file}: no section [{section}], nothing is taken from it; it has {other}')

    def fill(self, value, within=()):
        """Fill in $(ENV), @(file) and %(name), in uWSGI's order; what isn't known stays as it is."""
        if '$(' in value:
            value = substitute('$(', value, lambda name: os.environ.get(name))
        if '@(' in value:
            value = substitute('@(', value, read_text)
        if '%(' in value:
            value = substitute('%(', value, lambda names: self.compute(names, within))
        return value

    def compute(self, expression, within):
        """The text for %(name), %(a b) and %(a + b): names and numbers, strictly from left to right."""
        while '(' in expression:
            before, _, rest = expression.rpartition('(')
            inner, closing, rest = rest.partition(')')
            expression = before + str(self.compute(inner, within)) + rest
        result, operator = None, None
        for token in expression.split() or ['']:
            if token in OPERATORS:
                operator = token
                continue
            if not token.isdecimal():
                found = next((s.value for s in self.all if s.name == token), None)
                if found is None or token in within:
                    return None
                token = self.fill(found, (*within, token))
            if result is None:
                result = token
            elif operator is None:
                result += token
            else:
                result = str(OPERATORS[operator](leading_number(result), leading_number(token)))
        return result

    def expand(self):
        for setting in self.all:
            setting.value = self.fill(setting.value, (setting.name,))


OPERATORS = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '*': lambda a, b: a * b,
             '/': lambda a, b: a // b if b else 0}


def block_kind(name):
    """('if' or 'for', the rest of the name) for a name that opens a block, else None."""
    for kind in ('if', 'for'):
        rest = name[len(kind):].lstrip('-')
        if name.startswith(kind) and (name == 'for' or rest in ('glob', 'readline', 'times') or
                                      kind == 'if' and rest.replace('not-', '', 1) in CONDITIONS):
            return kind, rest
    return None


def leading_number(value):
    """As C's strtol(): the digits at the front, or 0."""
    digits = value[:len(value) - len(value.lstrip('0123456789'))]
    return int(digits or 0)


def substitute(opening, value, replacement):
    """Replace each opening...) (parentheses balanced) by replacement(...); None leaves it as it is."""
    out, at = '', 0
    while True:
        start = value.find(opening, at)
        end, depth = start + 2, 1
        while start >= 0 and depth and end < len(value):
            depth += {'(': 1, ')': -1}.get(value[end], 0)
            end += 1
        if start < 0 or depth:
            return out + value[at:]
        new = replacement(value[start + 2:end - 1])
        out += value[at:start] + (value[start:end] if new is None else new)
        at = end


def read_text(name):
    """The content of a file for @(file), less one line end."""
    if '://' in name:
        raise ConfigError(f'@({name}): only files can be read; run the command before the start and use $(VARIABLE)')
    try:
        with open(name, encoding='utf-8', errors='surrogateescape') as file:
            content = file.read()
    except OSError as error:
        raise ConfigError(f"@({name}): can't read it: {error.strerror}") from None
    return content[:-1] if content.endswith('\n') else content


def expand_magic(line, file, section):
    """Fill in %n, %d, %k … (file, directory, cores …) as uWSGI does; an unknown one stays."""
    absolute = os.path.abspath(file)
    directory, base = os.path.split(absolute)
    stem, dot, extension = base.rpartition('.')
    values = {'o': file, 'p': absolute, 's': base, 'n': stem or base, 'e': extension, 'd': directory.rstrip('/') + '/',
              'c': os.path.basename(directory), 'x': '' if section == 'uwsgi' else section, 'v': os.getcwd(),
              'V': __version__, 'h': os.uname().nodename, 'k': str(os.cpu_count()), 't': str(int(time.time())),
              'u': str(os.getuid()), 'g': str(os.getgid()), '%': '%', '[': '\33', '(': '%('}
    values.update((str(i), part) for i, part in enumerate(directory.split('/')[1:11]))
    values.update((letter.upper(), values[letter]) for letter in 'opsndecx')
    out, at = '', 0
    while (start := line.find('%', at)) >= 0:
        letter = line[start + 1:start + 2]
        out += line[at:start] + values.get(letter, '%' + letter)
        at = start + 2
    return out + line[at:]


def command_line(arguments, settings):
    """Take the arguments: options (as --name value, --name=value, -x value), .ini and .py files."""
    rest = list(arguments)
    given = []
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.lstrip('-').partition('=')
        if argument[:1] != '-':
            file, _, _ = argument.partition('.ini:')
            if argument.endswith('.ini') or '.ini:' in argument or argument == '-':
                settings.add('ini', argument, 'command line')
            elif argument.endswith(('.py', '.wsgi')):
                given.append(('wsgi-file', argument))
            elif ':' in argument and '/' not in argument:
                given.append(('module', argument))
            else:
                raise ConfigError(f"command line: what is {argument!r}? A .ini or .py file or module:callable is "
                                  "expected; see --help")
            continue
        if argument[:2] != '--':
            name, equals, value = argument[:2], argument[2:] and '=', argument[2:].lstrip('=')
        option = BY_NAME.get(name) or only_one(name)
        if option is None:
            if fate(name)[0] == 'unknown':
                raise ConfigError(f'command line: unknown option {argument}{guess(name)}; see --help')
            if not equals and rest and rest[0][:1] != '-':
                value = rest.pop(0)
        elif not equals and option.convert is not flag:
            optional = option.convert is octal and not (rest and rest[0].isdigit())
            if not optional:
                if not rest:
                    raise ConfigError(f'command line: {argument} needs a value: {option.convert.__doc__}')
                value = rest.pop(0)
        name = option.name if option else name
        if name == 'ini':
            settings.add(name, value, 'command line')
        else:
            given.append((name, value))
    for name, value in given:                           # after the files: the command line wins
        settings.add(name, value, 'command line')


def only_one(prefix):
    """The option that a prefix of its name stands for, as getopt_long() allows, if there is just one."""
    found = {BY_NAME[name] for name in BY_NAME if name.startswith(prefix) and prefix[:1] != '-'}
    return found.pop() if len(found) == 1 else None


def guess(name):
    import difflib
    near = difflib.get_close_matches(name, [n for n in BY_NAME if n[0] != '-'], 1, 0.75)
    return f", did you mean '{near[0]}'?" if near else ''


class Config:
    """The options as attributes (- becomes _); nothing changes them after load_config()."""

    def __init__(self, settings):
        self.settings, self.warnings, self.errors = settings.all, settings.warnings, []
        for option in ROWS:
            setattr(self, option.attribute, option.default)
        used = ' '.join(s.value for s in settings.all)  # before expand(): which names are variables
        settings.expand()
        for setting in settings.all:
            self.take(setting, used)
        if self.strict:
            self.errors += [f'{s.where}: {s.remark} (strict)' for s in settings.all if s.fate == 'unknown']

    def take(self, setting, used):
        """Give one setting its fate, and its value to the attribute that it sets."""
        if setting.fate == 'unknown' and setting.name.replace('_', '-') in BY_NAME:
            setting.remark = f"'{setting.name}' is written '{setting.name.replace('_', '-')}'"
            self.warnings.append(f'{setting.where}: {setting.remark}')
            setting.fate, setting.name = 'used', setting.name.replace('_', '-')
        if setting.fate == 'unknown':
            if f'%({setting.name}' in used or f' {setting.name}' in used and '%(' in used:
                setting.fate = 'variable'
            else:
                setting.remark = f"unknown option '{setting.name}'{guess(setting.name)}"
                self.warnings.append(f'{setting.where}: {setting.remark}')
        elif setting.fate == 'unsupported':
            self.warnings.append(f"{setting.where}: '{setting.name}' isn't supported: {setting.remark}")
        if setting.fate == 'used':
            self.convert(setting, BY_NAME[setting.name])

    def convert(self, setting, option):
        value = setting.value
        if option.convert is not anything:
            value = self.without_comment(setting)
            if value[:1] in ('"', "'") and value[-1:] == value[:1]:
                self.warn(setting, 'the quotes are part of the value; leave them out')
        if option.convert in (number, positive) and value.lower() in BOOLEANS:
            self.warn(setting, f'{option.convert.__doc__} is expected; taken as {option.default}')
            return
        try:
            value = option.convert(value)
        except ValueError:
            setting.remark = f"'{setting.name} = {value}': {option.convert.__doc__} is expected"
            self.errors.append(f'{setting.where}: {setting.remark}')
            return
        if type(option.default) is tuple:
            value = (*getattr(self, option.attribute), value)
        setattr(self, option.attribute, value)

    def without_comment(self, setting):
        """uWSGI keeps a comment after a value as a part of it, which is never meant."""
        at = min((i for i in map(setting.value.find, (' ;', ' #', '\t;', '\t#')) if i >= 0), default=-1)
        if at < 0:
            return setting.value
        self.warn(setting, f'a comment needs a line of its own; {setting.value[at:].strip()!r} is left out')
        setting.value = setting.value[:at].rstrip()
        return setting.value

    def warn(self, setting, remark):
        setting.remark = remark
        self.warnings.append(f'{setting.where}: {setting.name}: {remark}')


def load_config(arguments):
    """A Config from the environment, the files and the command line (a list of arguments)."""
    settings = Settings()
    for name, value in os.environ.items():
        if name.startswith('UWSGI_') and fate(name[6:].lower().replace('_', '-'))[0] == 'used':
            settings.add(name[6:].lower().replace('_', '-'), value, f'environment {name}')
    command_line(arguments, settings)
    return Config(settings)


def usage():
    lines = [__doc__.split('\n\n')[0], '', 'python3 minuwsgi.py [FILE.ini[:SECTION] | FILE.py | MODULE:CALLABLE] [OPTION ...]']
    for row in OPTIONS:
        if type(row) is str:
            lines.append(f'\n{row}')
            continue
        option = Option(*row)
        name = ', '.join([f'--{option.name}', *option.short]) + ('' if option.convert is flag else ' V')
        default = f' [{option.default}]' if option.default not in (None, False, 0, ()) else ''
        lines.append(f'  {name:30} {option.meaning}{default}')
    return '\n'.join(lines) + '''

  --stop PIDFILE, --reload PIDFILE   send SIGTERM, SIGHUP to the master
  --curl SOCKET [PATH]               ask a uwsgi server and print its answer
  --version, --help
'''


# ---------------------------------------------------------------------------------------------
# 2. Log
#
# Everything goes to descriptor 2, which `logto` puts on a file. One line is one os.write(), so that
# the lines of many processes don't mix. A log that can't be written (pipe closed, disk full) is no
# reason to stop serving.

EXIT_CONFIG = 1                         # a mistake in the configuration, an address that can't be bound
EXIT_NO_APP = 22                        # the application can't be loaded; uWSGI's number


def log(message):
    try:
        os.write(2, f'{message}\n'.encode('utf-8', 'backslashreplace'))
    except OSError:
        pass


def log_exception(message):
    """Log a message and the traceback of the exception that is being handled."""
    import traceback
    log(f'{message}\n{traceback.format_exc().rstrip()}')


def open_log(name):
    """Let the descriptors 1 and 2 write to the end of a file."""
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    except OSError as error:
        raise ConfigError(f"can't write the log {name}: {error.strerror}") from None
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


# ---------------------------------------------------------------------------------------------
# 3. Sockets
#
# The master binds, the workers accept: all of them inherit the same listening socket, and the
# kernel gives each connection to one of them. A unix socket has its mode from the first moment
# (umask round bind), and its file is removed only while it is still ours (device and inode), as
# another server may have taken the name over.

class Listener:
    """A listening socket.

    address: a path, @name (abstract), host:port, :port, [v6]:port, fd://N.
    protocol: 'uwsgi' or 'http'.  fd: an inherited descriptor, which isn't bound again."""

    def __init__(self, address, protocol, config, fd=None, inode=None):
        self.address, self.protocol, self.inode = address, protocol, inode
        for prefix in ('unix://', 'unix:'):
            if address.startswith(prefix):
                address = address[len(prefix):]
        if address.startswith('fd://'):
            fd = int(address[5:])
        self.path = None if ':' in address or address[:1] == '@' else os.path.abspath(address)
        self.name = address
        try:
            if fd is not None:
                self.socket = socket.socket(fileno=fd)
                os.set_inheritable(fd, False)
            elif self.path or address[:1] == '@':
                self.bind_unix(address, config)
            else:
                self.bind_tcp(address)
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't bind {self.address}: {getattr(error, 'strerror', None) or error}") from None
        self.socket.listen(config.listen)
        self.socket.setblocking(True)
        self.host, _, self.port = self.name.rpartition(':') if self.path is None else ('localhost', '', '80')

    def bind_unix(self, address, config):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if self.path is None:
            self.socket.bind('\0' + address[1:])
            return
        if len(os.fsencode(self.path)) > 107:
            raise ConfigError(f"can't bind {address}: the path is longer than the 107 bytes a unix socket may have")
        if not os.path.isdir(os.path.dirname(self.path)):
            raise ConfigError(f"can't bind {address}: there is no directory {os.path.dirname(self.path)}")
        remove_stale_socket(self.path)
        mode = 0o660 if config.chmod_socket is None else config.chmod_socket
        before = os.umask(0o777 & ~mode)
        try:
            self.socket.bind(self.path)
        finally:
            os.umask(before)
        stat = os.stat(self.path)
        self.inode = stat.st_dev, stat.st_ino
        if config.chown_socket or config.uid or config.gid:
            os.chown(self.path, *owner(config.chown_socket or f'{config.uid or ""}:{config.gid or ""}'))

    def bind_tcp(self, address):
        host, _, port = address.rpartition(':')
        if not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"can't bind {address}: {port!r} is no port; write host:port or :port")
        host = host.strip('[]')
        found = socket.getaddrinfo(host or '0.0.0.0', int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, where = found[0]
        self.socket = socket.socket(family, kind)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # what it accepts inherits this
        self.socket.bind(where)
        host, port = self.socket.getsockname()[:2]
        self.name = f'[{host}]:{port}' if ':' in host else f'{host}:{port}'

    def vacuum(self):
        """Remove the socket's file if it is still the one that was bound here."""
        try:
            stat = os.stat(self.path)
            if (stat.st_dev, stat.st_ino) == self.inode:
                os.unlink(self.path)
        except (OSError, TypeError):
            pass


def remove_stale_socket(path):
    """Make way for bind(): remove a socket that nobody listens on, and nothing else."""
    import stat
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"can't bind {path}: there is a file of that name that isn't a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise ConfigError(f"can't bind {path}: a socket is there that {error.strerror}") from None
        raise ConfigError(f"can't bind {path}: another server listens there, {holder(probe)}")


def holder(probe):
    """Who listens at the other end of a connected unix socket, see unix(7) on SO_PEERCRED."""
    if not hasattr(socket, 'SO_PEERCRED'):
        return 'of an unknown pid'
    pid = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
    try:
        with open(f'/proc/{pid}/cmdline', 'rb') as file:
            command = file.read().replace(b'\0', b' ').decode(errors='replace').strip()
    except OSError:
        command = '?'
    return f'pid {pid} ({command[:200]}); stop it, or choose another name'


def owner(names):
    """(uid, gid) for 'user', 'user:group' or ':group', by name or number; -1 leaves one as it is."""
    import grp
    import pwd
    user, _, group = names.partition(':')
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid if user else -1
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid if group else -1
    except KeyError as error:
        raise ConfigError(f'{names}: {error.args[0]}') from None
    return uid, gid


# ---------------------------------------------------------------------------------------------
# 4. The uwsgi protocol
#
#     modifier1 | size of the block | modifier2 | block                          | body
#     1 byte    | 2, little endian  | 1 byte    | size bytes                     | CONTENT_LENGTH bytes
#                                                 (size, name, size, value) ...
#
# https://uwsgi-docs.readthedocs.io/en/latest/Protocol.html. modifier1 is 0 for a WSGI request. The
# block is the CGI environment: its text becomes the WSGI environ as it is, in latin-1 (PEP 3333).

PACKET_MAX = 4 + 0xffff                 # the largest packet, without its body
PING, PONG = 100, b'\x64\0\0\1'         # modifier1 of a health check, and its answer
WSGI, WSGI_STRIP = 0, 30                # 30: PATH_INFO begins with SCRIPT_NAME, which is taken off


class BadRequest(Exception):
    """A request that can't be understood: the status for the client, and why, for both."""

    def __init__(self, why, status='400 Bad Request'):
        super().__init__(why)
        self.status = status


class ClientGone(OSError):
    """The client closed its connection, was too slow, or has got all that it wanted."""


def pack_request(variables, modifier1=WSGI):
    """{name: value} (str, latin-1) -> the packet (bytes) without a body."""
    block = b''.join(len(raw).to_bytes(2, 'little') + raw
                     for item in variables.items() for raw in map(str.encode, item, ('latin-1', 'latin-1')))
    return bytes((modifier1,)) + len(block).to_bytes(2, 'little') + b'\0' + block


def unpack_vars(block):
    """The block of a packet (bytes) -> [(name, value), ...] (str). This is the protocol in short; the
    worker uses Expected, which gives the same and is faster."""
    text, at, end, found = block.decode('latin-1'), 0, len(block), []
    while at < end:
        pair = []
        for _ in 'name', 'value':
            begin = at + 2
            at = begin + int.from_bytes(block[at:begin], 'little')
            if begin > end or at > end:
                raise BadRequest('the lengths in the block of variables do not add up')
            pair.append(text[begin:at])
        if not pair[0]:
            raise BadRequest('a variable without a name')
        found.append(tuple(pair))
    return found


# What a web server sends the same with each request, if nothing else is set up.
CONSTANT = frozenset(('DOCUMENT_ROOT', 'SERVER_PROTOCOL', 'REQUEST_SCHEME', 'SERVER_PORT', 'SERVER_NAME', 'HTTPS',
                      'SCRIPT_NAME', 'SERVER_SOFTWARE', 'GATEWAY_INTERFACE', 'UWSGI_SCHEME'))
UNWANTED = frozenset(('HTTP_CONTENT_LENGTH', 'HTTP_CONTENT_TYPE'))      # PEP 3333: they have no HTTP_
UNPLANNED = UNWANTED | {'HTTP_TRANSFER_ENCODING'}


def set_scheme(environ):
    """wsgi.url_scheme from what the web server says of its client's connection."""
    https = environ.get('HTTPS', '').lower() in ('on', '1', 'true', 'https')
    environ['wsgi.url_scheme'] = environ.get('UWSGI_SCHEME') or (
        'https' if https else environ.get('REQUEST_SCHEME') or 'http')


class Expected:
    """What the next packet looks like, guessed from an earlier one: -4 us of 14 for each request.

    A web server sends its variables in the same order each time. So a plan has, for each variable that
    changes, a piece (raw, size, name): the text in front of its value, to be compared at once instead
    of reading a length and looking up a name. Variables that stay the same are a part of the next raw,
    with their value, which is in the plan's template already. What comes before the REQUEST_URI of a
    GET without a query is one text, `start`. Nothing is believed unseen: from the first piece that
    isn't there, rest() reads the block without a guess."""

    def __init__(self, base):
        self.base = base                                # the environ without the web server's variables
        self.names = {}                                 # size's high byte + name -> name
        # start, its end, copy the template and pieces after it; the same without start; variables
        self.plan = '\0', 5, base.copy, (), base.copy, (), 0
        self.skipped = {}                               # raw -> (variables before it, constants in it and after it)
        self.countdown = 0

    def rest(self, environ, memory, text, at, raw):
        """Read the variables from at on; raw is the piece that wasn't there ('': all were). Their number."""
        number, constants = self.skipped.get(raw, (self.plan[-1], ()))
        for name in constants:
            environ.pop(name, None)
        names, end = self.names, len(text)
        while at < end:
            middle = at + 2 + memory[at]
            value = middle + 2
            after = value + memory[middle] + (memory[middle + 1] << 8)
            name = names.get(text[at + 1:middle]) or self.learn_name(text[at + 1:middle])
            if name[:5] == 'HTTP_' and name in environ:
                environ[name] += ('; ' if name == 'HTTP_COOKIE' else ', ') + text[value:after]
            else:
                environ[name] = text[value:after]
            at = after
            number += 1
        if at != end or end == 4:
            raise BadRequest('the lengths in the block of variables do not add up' if end > 4 else 'an empty request')
        for name in UNWANTED:
            environ.pop(name, None)
        set_scheme(environ)
        if 'HTTP_TRANSFER_ENCODING' in environ and not environ.get('CONTENT_LENGTH'):
            raise BadRequest('a chunked body without a length: set uwsgi_request_buffering on', '411 Length Required')
        self.countdown -= 1
        if self.countdown < 0:                          # now and then: traffic changes
            self.countdown = 200
            self.learn_order(memory, text)
        return number

    def learn_name(self, raw):
        if raw[:1] != '\0' or len(raw) < 2:             # else the high byte of the size would be ignored
            raise BadRequest('a variable without a name' if raw == '\0' else 'a name of more than 255 bytes')
        name = sys.intern(raw[1:])
        if len(self.names) < 1000:                      # clients can invent headers
            self.names[raw] = name
        return name

    def learn_order(self, memory, text):
        """Make the plan from a block that was found to be right."""
        found, at = {}, 4                               # name -> (where its value begins, where it ends)
        while at < len(text):
            value = at + 4 + memory[at]
            after = value + memory[value - 2] + (memory[value - 1] << 8)
            name = sys.intern(text[at + 2:value - 2])
            if name in found or name in UNPLANNED:
                self.countdown = 0                      # not a good example
                return
            found[name] = value, after
            at = after
        names = list(found)
        last = max((i for i, name in enumerate(names) if name not in CONSTANT), default=-1)
        pieces, template, constants, begin, first = [], dict(self.base), [], 4, 0
        for i, (name, (value, after)) in enumerate(found.items()):
            if name in CONSTANT and i < last:
                template[name] = text[value:after]
                constants.append((i, name))
            else:
                pieces.append((text[begin:value - 2], value - 2 - begin, name))
                begin = after
        set_scheme(template)
        self.skipped = {}
        for raw, _, name in pieces:
            self.skipped[raw] = first, [constant for i, constant in constants if i >= first]
            first = names.index(name) + 1
        start, started, later = '\0', template, ()
        if 'REQUEST_URI' in found:
            before = names[:names.index('REQUEST_URI')]
            begun = {name: text[slice(*found[name])] for name in before}
            if begun.get('REQUEST_METHOD') == 'GET' and begun.get('QUERY_STRING') == begun.get('CONTENT_LENGTH') == '':
                start = text[4:found['REQUEST_URI'][0] - 2]
                started = {**template, **begun}
                later = ('', 0, 'REQUEST_URI'), *pieces[[name for _, _, name in pieces].index('REQUEST_URI') + 1:]
        self.plan = start, 4 + len(start), started.copy, later, template.copy, tuple(pieces), len(found)


# ---------------------------------------------------------------------------------------------
# 5. HTTP/1.1
#
# RFC 9112, as far as a server behind a load balancer or for a browser needs it. The head becomes
# the same environ as a packet. What could be read in two ways (and so smuggle a request past a
# proxy) is refused: lengths given twice, bare line ends, blanks before a colon.

HEAD_MAX, LINE_MAX, FIELDS_MAX = 65536, 16384, 200      # bytes of a head, of its first line; lines after that
TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
HOST = frozenset("-._~%!$&'()*+,;=:[]0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
CONTROL = bytes((*range(9), *range(10, 32), 127))       # all but the tab
SINGLE = frozenset(('CONTENT_LENGTH', 'CONTENT_TYPE', 'HTTP_HOST', 'HTTP_TRANSFER_ENCODING'))
HEADER_KEYS = {}                        # a header's name as it was sent -> its key in the environ, '' for none


def header_key(name):
    """'User-Agent' -> 'HTTP_USER_AGENT'; '' where the header must not reach the application."""
    if not name or not TOKEN.issuperset(name):
        raise BadRequest(f'{name[:100]!r} is no name of a header')
    key = name.upper().replace('-', '_')
    if '_' in name or key == 'PROXY':
        key = ''                        # X_A would pass for X-A; HTTP_PROXY would steer the application's clients
    elif key not in ('CONTENT_TYPE', 'CONTENT_LENGTH'):
        key = 'HTTP_' + key
    if len(HEADER_KEYS) < 1000:         # clients can invent headers
        HEADER_KEYS[name] = sys.intern(key)
    return key


def parse_head(head, environ):
    """Read a request head (bytes, without the empty line at its end) into environ."""
    lines = head.decode('latin-1').split('\r\n')
    if len(lines[0]) > LINE_MAX:
        raise BadRequest('the first line is too long', '414 URI Too Long')
    if len(lines) > FIELDS_MAX:
        raise BadRequest(f'more than {FIELDS_MAX} headers', '431 Request Header Fields Too Large')
    if len(head) - len(head.translate(None, CONTROL)) != 2 * len(lines) - 2:
        raise BadRequest('a control character in the head')
    parse_first_line(lines.pop(0), environ)
    host = environ.pop('HTTP_HOST', None)               # of a target http://host/path: it counts then
    before = len(environ)
    for line in lines:
        name, colon, value = line.partition(':')
        if not colon:
            raise BadRequest(f'{line[:100]!r} is no header')
        key = HEADER_KEYS.get(name)
        if key is None:
            key = header_key(name)
        environ[key] = value.strip(' \t')
    if len(environ) != before + len(lines) or '' in environ:
        join_headers(lines, environ)
    if 'HTTP_HOST' not in environ and environ['SERVER_PROTOCOL'] == 'HTTP/1.1':
        raise BadRequest('no Host')
    if not HOST.issuperset(environ.get('HTTP_HOST', '')):
        raise BadRequest('a Host that is no name of a host')
    if host is not None:
        environ['HTTP_HOST'] = host


def parse_first_line(line, environ):
    parts = line.split(' ')
    if len(parts) != 3 or not parts[0] or not TOKEN.issuperset(parts[0]):
        raise BadRequest('the first line is not METHOD TARGET HTTP/1.1')
    method, target, protocol = parts
    environ['REQUEST_METHOD'], environ['REQUEST_URI'] = method, target
    if protocol not in ('HTTP/1.1', 'HTTP/1.0'):
        other = len(protocol) == 8 and protocol[:5] == 'HTTP/' and protocol[6] == '.' and protocol[5::2].isdecimal()
        raise BadRequest(f'protocol {protocol[:20]!r}',
                         '505 HTTP Version Not Supported' if other else '400 Bad Request')
    environ['SERVER_PROTOCOL'] = protocol
    if '#' in target or '\t' in target:
        raise BadRequest('a fragment or a tab in the target')
    path, _, query = target.partition('?')
    if path[:1] != '/':
        path = target_path(method, path, environ)
    environ['PATH_INFO'] = path if '%' not in path else unquote(path)
    environ['QUERY_STRING'] = query


def target_path(method, target, environ):
    """The path of a target that doesn't begin with /: http://host/path, or * of OPTIONS."""
    scheme, slashes, rest = target.partition('://')
    if slashes and scheme.lower() in ('http', 'https'):
        environ['HTTP_HOST'], _, path = rest.partition('/')
        if environ['HTTP_HOST'] and HOST.issuperset(environ['HTTP_HOST']):
            return '/' + path
    elif target == '*' and method == 'OPTIONS':
        return target
    raise BadRequest(f'the target {target[:100]!r}',
                     '501 Not Implemented' if method == 'CONNECT' else '400 Bad Request')


def join_headers(lines, environ):
    """Some header came more than once, or is unwanted: gather the values anew."""
    values = {}
    for line in lines:
        name, _, value = line.partition(':')
        values.setdefault(header_key(name), []).append(value.strip(' \t'))
    for key, several in values.items():
        if len(several) > 1 and key in SINGLE:
            raise BadRequest(f'{key.replace("HTTP_", "")} is there twice')
        environ[key] = ('; ' if key == 'HTTP_COOKIE' else ', ').join(several)
    environ.pop('', None)


def unquote(path):
    from urllib.parse import unquote_to_bytes
    return unquote_to_bytes(path.encode('latin-1')).decode('latin-1')


def words(value):
    """'a, B' -> ['a', 'b']: the value of a header that is a list."""
    return [word.strip(' \t') for word in value.lower().split(',')]


def keeps(environ):
    """May more requests follow on this connection?"""
    wish = words(environ.get('HTTP_CONNECTION', ''))
    return 'close' not in wish and (environ['SERVER_PROTOCOL'] == 'HTTP/1.1' or 'keep-alive' in wish)


def body_length(environ):
    """How many bytes of body follow a head; -1: chunked."""
    coding, length = environ.get('HTTP_TRANSFER_ENCODING'), environ.get('CONTENT_LENGTH')
    if coding is not None:
        if length is not None or environ['SERVER_PROTOCOL'] == 'HTTP/1.0':
            raise BadRequest('Transfer-Encoding beside Content-Length or in HTTP/1.0')
        codings = words(coding)
        if codings != ['chunked']:      # where chunked isn't the last one, nobody knows the length
            understood = codings[-1] == 'chunked' and codings.count('chunked') == 1 and all(codings)
            raise BadRequest(f'Transfer-Encoding {coding[:50]!r}',
                             '501 Not Implemented' if understood else '400 Bad Request')
        return -1
    return content_length(length) if length is not None else 0


def content_length(value):
    if not (value.isascii() and value.isdecimal() and len(value) < 19):
        raise BadRequest(f'Content-Length {value[:30]!r}')
    return int(value)


def hopeless(data):
    """What is wrong with a head that has only begun, as the arguments of BadRequest, or None."""
    if data[:2] == b'\x16\x03':
        return 'this is TLS, and the socket speaks plain HTTP: use http://, or let nginx speak TLS in front',
    if data[:1] == b'\0':
        return 'this looks like a uwsgi packet, and the socket speaks HTTP: in nginx use proxy_pass, or here socket',
    if not TOKEN.issuperset(data[:1].decode('latin-1').strip()):
        return 'this is not HTTP',
    if data.count(b'\n') != data.count(b'\r\n'):
        return 'a line ends without CR',
    if len(data) > LINE_MAX and b'\r\n' not in data[:LINE_MAX]:
        return 'the first line is too long', '414 URI Too Long'
    return None


def client_address(environ, trusted):
    """Behind a proxy that is trusted: who is its client? X-Forwarded-For has each proxy's client, the last
    one's at the end; what stands left of an address that isn't trusted may be invented."""
    from ipaddress import ip_address
    for value in reversed(environ.get('HTTP_X_FORWARDED_FOR', '').split(',')):
        value = value.strip(' \t')
        try:
            address = ip_address(value)
        except ValueError:
            break
        environ['REMOTE_ADDR'], environ['REMOTE_PORT'] = value, ''
        if not any(address in network for network in trusted):
            break
    scheme = words(environ.get('HTTP_X_FORWARDED_PROTO', ''))[-1]
    if scheme in ('http', 'https'):
        environ['wsgi.url_scheme'] = scheme


# ---------------------------------------------------------------------------------------------
# 6. WSGI (PEP 3333)
#
# The application gets environ and start_response, and returns an iterable of bytes. One Response
# for each thread that serves is used for one request after the other: it checks the head, holds the
# application to the length that it promised, and sends. Whoever owns the descriptor of a connection
# closes it: that is the worker, until hand_over() gives it to an offload thread.

SMALL = 32768                           # so much always fits into an empty socket buffer: write() can't block
IOV_MAX = 1024
READ_MAX = 65536


def nowait_flag():
    """RWF_NOWAIT where preadv() takes it for sockets (Linux 6.5), else 0. See preadv2(2).

    With it, reading from a blocking socket fails instead of waiting: no call is needed to make each
    connection non-blocking (-0.4 us)."""
    a, b = socket.socketpair()
    with a, b:
        try:
            os.preadv(a.fileno(), [bytearray(1)], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return os.RWF_NOWAIT
        except (OSError, AttributeError):
            return 0


NOWAIT = nowait_flag()


def wait_for(fd, event, deadline):
    """Wait until a descriptor is ready; deadline in seconds of time.monotonic()."""
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
        raise ClientGone(errno.ETIMEDOUT, 'the client was too slow')


def read_some(fd, buffer, deadline):
    """Read at least one byte into buffer (writable); how many."""
    while True:
        try:
            got = os.preadv(fd, [buffer], -1, NOWAIT)
        except BlockingIOError:
            wait_for(fd, select.POLLIN, deadline)
            continue
        except ConnectionError:
            got = 0
        if not got:
            raise ClientGone(errno.ECONNRESET, 'the client closed the connection')
        return got


def write_some(fd, chunks):
    """Write what fits of a list of bytes to a non-blocking descriptor, and leave the rest in the list."""
    try:
        sent = os.writev(fd, chunks[:IOV_MAX])
    except ConnectionError:
        raise ClientGone(0, 'before the end of the response') from None
    done = 0
    while done < len(chunks) and sent >= len(chunks[done]):
        sent -= len(chunks[done])
        done += 1
    del chunks[:done]
    if sent:
        chunks[0] = memoryview(chunks[0])[sent:]


class EmptyInput:
    """wsgi.input of all requests without a body: nothing to read, nothing to spoil."""

    __slots__ = ()

    def read(self, size=-1):
        return b''

    readline = read

    def readlines(self, hint=-1):
        return []

    def __iter__(self):
        return iter(())


class Body(io.RawIOBase):
    """A request body of known length: what came with the head, then what the connection brings.
    io.BufferedReader makes wsgi.input of it, and closes nothing."""

    def __init__(self, fd, begun, left, timeout):
        self.fd, self.begun, self.left, self.timeout = fd, begun, left, timeout
        self.wants_continue = False     # the client waits for 100 Continue before it sends

    def readable(self):
        return True

    def readinto(self, into):
        size = min(len(into), self.left)
        if not size:
            return 0
        if self.begun:
            size = min(size, len(self.begun))
            into[:size] = self.begun[:size]
            self.begun = self.begun[size:]
        else:
            size = self.receive(memoryview(into)[:size])
        self.left -= size
        return size

    def receive(self, into):
        if self.wants_continue:
            self.wants_continue = False
            write_some(self.fd, [b'HTTP/1.1 100 Continue\r\n\r\n'])
        return read_some(self.fd, into, time.monotonic() + self.timeout)

    def behind(self):
        """What was read beyond the end: the next requests."""
        return b''


class ChunkedBody(Body):
    """A request body in chunks, RFC 9112 section 7.1. `left` is 1 until its end was read."""

    def __init__(self, fd, begun, timeout, limit):
        super().__init__(fd, begun, 1, timeout)
        self.at = 0                             # so much of `begun` is used
        self.chunk = -1                         # bytes left of this chunk; -1: none was begun
        self.limit = limit

    def readinto(self, into):
        if self.chunk <= 0 and self.left:
            self.next_chunk()
        if not self.left:
            return 0
        if self.at == len(self.begun):
            self.more()
        size = min(len(into), self.chunk, len(self.begun) - self.at)
        into[:size] = self.begun[self.at:self.at + size]
        self.at += size
        self.chunk -= size
        return size

    def more(self):
        buffer = bytearray(READ_MAX)
        size = self.receive(buffer)
        self.begun, self.at = self.begun[self.at:] + buffer[:size], 0

    def next_chunk(self):
        if self.chunk == 0 and self.line():
            raise BadRequest('a chunk is longer than its size')
        size, semicolon, _ = self.line().partition(b';')
        size = size.rstrip(b' \t') if semicolon else size
        if not size or len(size) > 15 or size.strip(b'0123456789abcdefABCDEF'):
            raise BadRequest(f'{size[:30]!r} is no size of a chunk')
        self.chunk = int(size, 16)
        self.limit -= self.chunk
        if self.limit < 0:
            raise BadRequest('the body is larger than limit-post', '413 Content Too Large')
        if self.chunk == 0:
            for _ in range(FIELDS_MAX):
                trailer = self.line()           # nobody needs them, but they have to be in order
                if not trailer:
                    self.left = 0
                    return
                header_key(trailer.partition(b':')[0].decode('latin-1') if b':' in trailer else '')
            raise BadRequest('too many trailers', '431 Request Header Fields Too Large')

    def line(self):
        while (end := self.begun.find(b'\n', self.at)) < 0 and len(self.begun) - self.at <= 1024:
            self.more()
        line, self.at = self.begun[self.at:end + 1], end + 1
        if not 1 < len(line) <= 1024 or line[-2:] != b'\r\n' or len(line.translate(None, CONTROL)) != len(line) - 2:
            raise BadRequest('a bad line between chunks')
        return line[:-2]

    def behind(self):
        return bytes(self.begun[self.at:])


class FileWrapper:
    """wsgi.file_wrapper: an iterable over a file; as it is, it goes out by sendfile(2)."""

    def __init__(self, file, block_size=8192):
        self.file, self.block_size = file, block_size
        if hasattr(file, 'close'):
            self.close = file.close

    def __iter__(self):
        return iter(lambda: self.file.read(self.block_size), b'')

    def descriptor(self):
        """(descriptor, offset, bytes from there) of a regular file, else None."""
        import stat
        try:
            fd, offset = self.file.fileno(), self.file.tell()
            status = os.fstat(fd)
        except (AttributeError, OSError, ValueError):
            return None
        if not stat.S_ISREG(status.st_mode) or not isinstance(self.file, (io.FileIO, io.BufferedIOBase)):
            return None
        return fd, offset, max(0, status.st_size - offset)


STATUS_LINES = {}                       # status that was checked -> (status line, has it no body)
HEADER_KINDS = {}                       # header that was checked -> what is special about it, '' for nothing
HOP_BY_HOP = frozenset(('connection', 'keep-alive', 'proxy-authenticate', 'proxy-authorization', 'te', 'trailer',
                        'trailers', 'transfer-encoding', 'upgrade'))


def status_line(status):
    """Check a status ('404 Not Found') that is new."""
    if type(status) is not str:
        raise TypeError(f'the status must be a str, not {type(status).__name__}')
    if not (status[:3].isascii() and status[:3].isdecimal() and status[3:4] in ('', ' ') and status.isprintable()):
        raise ValueError(f"{status!r} is no status such as '200 OK'")
    line = f'HTTP/1.1 {status}\r\n', status[:3] in ('204', '304') or status[0] == '1'
    if len(STATUS_LINES) < 1000:
        STATUS_LINES[status] = line
    return line


def header_kind(name):
    """Check the name of a response header that is new."""
    if type(name) is not str:
        raise TypeError(f'the name of a header must be a str, not {type(name).__name__}')
    if not name or not TOKEN.issuperset(name):
        raise ValueError(f'{name!r} is no name of a header')
    kind = name.lower()
    if kind in HOP_BY_HOP:
        raise ValueError(f'{name} belongs to the connection: an application must not send it (PEP 3333)')
    kind = kind if kind in ('content-length', 'date', 'server') else ''
    if len(HEADER_KINDS) < 1000:
        HEADER_KINDS[name] = kind
    return kind


def check_value(name, value):
    """A header's value that isn't only printable: nothing may end the line."""
    if '\n' in value or '\r' in value or '\0' in value:
        raise ValueError(f'a line end or NUL in the value of the header {name}: {value!r}')


class Response:
    """One response after the other. start_response() builds the head; write() and finish() send."""

    __slots__ = ('fd', 'timeout', 'status', 'head', 'end', 'headers', 'length', 'left', 'size', 'sent', 'no_body',
                 'head_only', 'http', 'keep', 'chunked', 'blocking', 'patience', 'ending', 'has_date', 'has_server',
                 'date', 'body')

    def __init__(self, config):
        self.timeout, self.patience = config.socket_timeout, config.http_timeout
        self.http = self.keep = self.chunked = self.sent = self.head_only = False
        self.status, self.end, self.date, self.ending, self.size = None, '\r\n', b'', '', 0
        self.head, self.headers, self.body = b'', (), None

    def start_response(self, status, headers, exc_info=None):
        if self.status is not None:
            if exc_info is None:
                raise AssertionError('start_response() was called a second time, without exc_info')
            if self.sent:
                try:
                    raise exc_info[1].with_traceback(exc_info[2])
                finally:
                    exc_info = None
        head, no_body = STATUS_LINES.get(status) or status_line(status)
        length = None
        for name, value in headers:
            kind = HEADER_KINDS.get(name)
            if kind is None:
                kind = header_kind(name)
            if kind:
                if kind == 'content-length':
                    if not value.isdecimal():
                        raise ValueError(f'Content-Length is {value!r}')
                    length = int(value)
                elif kind == 'date':
                    self.has_date = True
                else:
                    self.has_server = True
            try:
                if not value.isprintable():
                    check_value(name, value)
            except AttributeError:
                raise TypeError(f'the value of {name} must be a str, not {type(value).__name__}') from None
            head += f'{name}: {value}\r\n'
        self.head = (head + self.end).encode('latin-1')
        self.headers = headers
        self.no_body = no_body = no_body or self.head_only
        self.length = -1 if no_body else length
        self.left = 0 if no_body else length
        self.status = status
        return self.write

    def take_head(self):
        """The head as bytes, to be sent now with what comes first."""
        if self.status is None:
            raise AssertionError("the application didn't call start_response()")
        self.sent = True
        if not self.http:
            return self.head
        head = self.head[:-len(self.end)]               # what HTTP adds has to be found out now
        if not self.has_date:
            head += self.date
        if not self.has_server:
            head += b'Server: minuwsgi\r\n'
        if self.left is None:
            self.chunked = self.http == 'HTTP/1.1'
            if self.chunked:
                head += b'Transfer-Encoding: chunked\r\n'
            else:
                self.keep = False                       # the end of the connection is the end of the body
        elif self.length is None:
            head += b'Content-Length: %d\r\n' % self.left
        if self.body is not None and self.body.left:
            self.keep = self.body.wants_continue = False        # it may never come
        if not self.keep:
            head += b'Connection: close\r\n'
        elif self.http == 'HTTP/1.0':
            head += b'Connection: keep-alive\r\n'
        return head + b'\r\n'

    def frame(self, chunks):
        """Hold chunks to the promised length; put the head and the sizes of chunks round them."""
        head = None if self.sent else self.take_head()
        size = sum(map(len, chunks))
        if self.left is not None:
            if size > self.left:
                if not self.no_body:
                    log('the application sent more than its Content-Length; the rest is left out')
                chunks, size = trimmed(chunks, self.left), self.left
            self.left -= size
        self.size += size
        if self.chunked and size:
            chunks = [b'%x\r\n' % size, *chunks, b'\r\n']
        return chunks if head is None else [head, *chunks]

    def write(self, data):
        """PEP 3333's write(): send data (bytes) now."""
        if type(data) is not bytes:
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise TypeError(f'the body must be made of bytes, not of {type(data).__name__}')
            data = bytes(data)
        if data or not self.sent:
            self.send(self.frame([data]))

    def send(self, chunks):
        """Send a list of bytes; the client has `timeout` seconds to take some more each time."""
        self.unblock()
        while chunks:
            try:
                write_some(self.fd, chunks)
            except BlockingIOError:
                wait_for(self.fd, select.POLLOUT, time.monotonic() + self.timeout)

    def finish(self, result):
        """Send what the application returned; the job that is left if the client doesn't keep up, else None."""
        job = None
        try:
            kind = type(result)
            if kind is FileWrapper:
                job = self.file_job(result)
            elif kind is list or kind is tuple or kind is bytes:
                job = self.list_job([result] if kind is bytes else result)
            elif result is None:
                raise TypeError('the application returned None: is a `return` missing?')
            if job is None:
                for chunk in result:
                    self.write(chunk)
                job = self.list_job([])
            return run_a_while(self.fd, job)
        finally:
            if hasattr(result, 'close'):
                result.close()

    def list_job(self, chunks):
        """A job that sends the chunks and ends the response; None where they aren't bytes."""
        if not all(type(chunk) is bytes for chunk in chunks):
            return None
        if self.http and not self.sent and self.status is not None and self.left is None:
            self.left = sum(map(len, chunks))           # no need of HTTP's chunks
        chunks = self.frame(chunks) if chunks or not self.sent else []
        if self.chunked:
            chunks.append(b'0\r\n\r\n')
        if self.left:
            self.cut(f'the application sent {self.left} bytes less than its Content-Length')
        self.unblock()
        return send_chunks(self.fd, chunks, self.patience)

    def file_job(self, wrapper):
        """A job that sends a regular file from where it stands; None where it has to be read."""
        found = wrapper.descriptor()
        if found is None or self.chunked:
            return None
        fd, offset, size = found
        if self.left is None and self.http and not self.sent:
            self.left = size                            # no need of chunks
        head = [] if self.sent else [self.take_head()]
        if self.left is not None and self.left > size:
            self.cut(f'the file has {self.left - size} bytes less than the Content-Length')
        count = size if self.left is None else min(size, self.left)
        self.size += count
        self.unblock()
        return send_file(self.fd, head, os.dup(fd), offset, count, self.patience)

    def cut(self, why):
        """The client must not take for whole what isn't."""
        log(f'{why}; the connection is cut')
        self.keep, self.ending = False, 'cut'

    def unblock(self):
        if self.blocking:
            os.set_blocking(self.fd, False)
            self.blocking = False


def trimmed(chunks, size):
    """The first size bytes of a list of bytes."""
    kept = []
    for chunk in chunks:
        kept.append(chunk[:size])
        size -= len(kept[-1])
    return kept


# ---------------------------------------------------------------------------------------------
# 7. Other answers: static files
#
# If an option asks for static files, the application is wrapped in another, which answers GET and
# HEAD for regular files and leaves everything else to it. A path is followed to its end (links, ..)
# before it is compared with the directory that it must be in; so no spelling of it leads out.

def with_static_files(config, application):
    """The application, behind the static files that the options name."""
    if not (config.check_static or config.static_map or config.static_map2):
        return application
    import mimetypes
    mimetypes.init()                                    # once, before the fork
    places = [('', directory, False) for directory in config.check_static]
    for option, whole_path in (config.static_map, False), (config.static_map2, True):
        for value in option:
            mount, equals, target = value.partition('=')
            if not equals:
                raise AppError(f'static-map = {value}: /prefix=directory is expected')
            places.append((mount.strip().rstrip('/'), target.strip(), whole_path))
    for _, target, _ in places:
        if not os.path.exists(target):
            log(f'static files: there is no {os.path.abspath(target)}')
    places = [(mount, os.fsencode(os.path.abspath(target)), whole) for mount, target, whole in places]
    safe = [os.fsencode(os.path.realpath(directory)) for directory in config.static_safe]
    indexes = [os.fsencode(name).decode('latin-1') for name in config.static_index]
    expires = [expiry(value) for value in config.static_expires]

    def static_or_application(environ, start_response):
        if environ['REQUEST_METHOD'] in ('GET', 'HEAD'):
            path = environ['PATH_INFO']
            for mount, root, whole_path in places:
                if path == mount or path.startswith(mount + '/'):
                    found = find_file(root, path if whole_path else path[len(mount):], safe, indexes)
                    if found is not None:
                        seconds = next((seconds for matches, seconds in expires if matches(path)), None)
                        return send_static(environ, start_response, *found, seconds)
        return application(environ, start_response)
    return static_or_application


def expiry(value):
    """'*.css 3600' -> (what tells whether a path matches, 3600); a suffix, a glob or, as in uWSGI, a regex."""
    import fnmatch
    import re
    pattern, _, seconds = value.replace('=', ' ').rpartition(' ')
    pattern = pattern.strip()
    try:
        if not re.search(r'[\\^$|(+]|\.\*', pattern):
            pattern = fnmatch.translate(pattern if pattern[:1] in '/*' else '*' + pattern)
        return re.compile(pattern).search, int(seconds)
    except (ValueError, re.error):
        raise AppError(f'static-expires = {value}: PATTERN SECONDS is expected, such as *.css 3600') from None


def find_file(root, path, safe, indexes):
    """(open file, its status, its name) for a path below a root (bytes), or None."""
    import stat
    try:
        top = os.path.realpath(root)                    # each time: it may be a link to the current release
        name = os.path.realpath(top.rstrip(b'/') + path.encode('latin-1'))
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            for index in indexes:
                found = find_file(root, f'{path.rstrip("/")}/{index}', safe, ())
                if found is not None:
                    return found
        inside = any(name == directory or name.startswith(directory.rstrip(b'/') + b'/') for directory in (top, *safe))
        if not (stat.S_ISREG(status.st_mode) and inside) or path[-1:] == '/':
            return None
        file = open(name, 'rb', buffering=0)
        return file, os.fstat(file.fileno()), name
    except (OSError, ValueError):                       # not there, not ours to read; NUL in the name, too long
        return None


def send_static(environ, start_response, file, status, name, seconds):
    """Answer with a file, a part of it, or that the client's copy is good."""
    import mimetypes
    from email.utils import formatdate
    size, modified = status.st_size, formatdate(int(status.st_mtime), usegmt=True)
    tag = f'"{status.st_mtime_ns:x}-{size:x}"'
    headers = [('Last-Modified', modified), ('ETag', tag), ('Accept-Ranges', 'bytes')]
    if seconds is not None:
        headers.append(('Expires', formatdate(time.time() + seconds, usegmt=True)))
        headers.append(('Cache-Control', f'max-age={seconds}'))
    if is_fresh(environ, tag, status.st_mtime):
        file.close()
        start_response('304 Not Modified', headers)
        return []
    first, last = 0, size - 1
    wanted = environ.get('HTTP_RANGE') if environ['REQUEST_METHOD'] == 'GET' else None
    answer = '200 OK'
    if wanted and environ.get('HTTP_IF_RANGE', tag) in (tag, modified):
        first, last, answer = byte_range(wanted, size)
    if answer[:3] == '416':
        file.close()
        start_response(answer, [('Content-Range', f'bytes */{size}'), ('Content-Length', '0')])
        return []
    if answer[:3] == '206':
        headers.append(('Content-Range', f'bytes {first}-{last}/{size}'))
    kind, coding = mimetypes.guess_type(os.fsdecode(name))
    if coding:                                          # a .gz is meant to stay one
        kind = 'application/gzip' if coding == 'gzip' else None
    headers += [('Content-Type', kind or 'application/octet-stream'), ('Content-Length', str(last - first + 1))]
    start_response(answer, headers)
    file.seek(first)
    return FileWrapper(file)


def is_fresh(environ, tag, mtime):
    """Has the client got this version (RFC 9110, 13.2.2)?"""
    known = environ.get('HTTP_IF_NONE_MATCH')
    if known is not None:
        return known.strip() == '*' or any(one.strip().replace('W/', '', 1) == tag for one in known.split(','))
    from email.utils import mktime_tz, parsedate_tz
    try:
        return int(mtime) <= mktime_tz(parsedate_tz(environ['HTTP_IF_MODIFIED_SINCE']))
    except (KeyError, TypeError, ValueError, OverflowError, IndexError):
        return False


def byte_range(wanted, size):
    """(first byte, last byte, status) for a Range header; the whole file for one that isn't understood, or for
    several ranges (RFC 9110, 14.2)."""
    unit, _, text = wanted.partition('=')
    begin, dash, end = (part.strip() for part in text.partition('-'))
    sane = unit.strip().lower() == 'bytes' and dash and len(text) < 40 and text.isascii() and (begin + end).isdecimal()
    if not sane or begin and end and int(begin) > int(end):
        return 0, size - 1, '200 OK'
    first, last = (int(begin), int(end or size)) if begin else (max(0, size - int(end)), size)
    last = min(last, size - 1)
    if first > last:
        return 0, 0, '416 Range Not Satisfiable'
    return first, last, '206 Partial Content'


# ---------------------------------------------------------------------------------------------
# 8. Jobs and offload threads
#
# A client that reads slowly must not hold a worker. What is left to send is a job: a generator that
# does what can be done at once and yields (event, seconds) when it has to wait. The worker runs it
# itself as long as the client keeps up, which is the cheapest way; then the job moves to a thread
# that waits for hundreds of descriptors at a time. sendfile(2) and writev(2) run without the GIL.

PATIENCE = 0.01                         # seconds that a worker waits for a client before it hands the job over


def send_chunks(fd, chunks, seconds):
    """Send a list of bytes; the client has `seconds` to take some more each time."""
    while chunks:
        try:
            write_some(fd, chunks)
        except BlockingIOError:
            yield select.POLLOUT, seconds


def send_file(fd, head, file, offset, count, seconds):
    """Send head (a list of bytes), then count bytes of a file from offset; close the file's descriptor."""
    try:
        yield from send_chunks(fd, head, seconds)
        while count:
            try:
                sent = os.sendfile(fd, file, offset, min(count, 1 << 20))
            except BlockingIOError:
                yield select.POLLOUT, seconds
                continue
            except ConnectionError:
                raise ClientGone(0, 'before the end of the file') from None
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
                data = os.pread(file, min(count, 1 << 18), offset)      # a file system without sendfile
                sent = len(data)
                yield from send_chunks(fd, [data] if data else [], seconds)
            if not sent:
                raise OSError(errno.EIO, f'the file became {count} bytes shorter while it was sent')
            offset += sent
            count -= sent
    finally:
        os.close(file)


def drain(fd):
    """Take what the client still sends, for at most 64 MiB or 2 s of silence, so that it reads our
    answer: closing with unread bytes would reset the connection, and nginx then answers 502."""
    with socket.socket(fileno=os.dup(fd)) as connection:
        connection.shutdown(socket.SHUT_WR)
    left = 1 << 26
    os.set_blocking(fd, False)
    while left > 0:
        try:
            got = os.read(fd, READ_MAX)
        except BlockingIOError:
            yield select.POLLIN, 2
            continue
        if not got:
            return
        left -= len(got)


def run_a_while(fd, job):
    """Run a job while the client keeps up. Returns None when it is done, else the job, begun, with
    what it waits for: (job, event, seconds)."""
    until = None
    for event, seconds in job:
        now = time.monotonic()
        until = until or now + PATIENCE
        poll = select.poll()
        poll.register(fd, event)
        if now >= until or not poll.poll((until - now) * 1000):
            return job, event, seconds
    return None


class Offloader:
    """A thread of a worker that runs jobs. It starts with the first job."""

    def __init__(self):
        self.inbox = collections.deque()                # (fd, (job, event, seconds), done)
        self.thread = None
        self.jobs = {}                                  # fd -> [job, event, deadline, done]

    def take(self, fd, waiting, done):
        """Run a job that run_a_while() returned to its end; then done(fd, ok) owns the descriptor."""
        self.inbox.append((fd, waiting, done))
        if self.thread is None:
            self.wake_read, self.wake_write = os.pipe()
            os.set_blocking(self.wake_read, False)
            import threading
            self.thread = threading.Thread(target=self.run, name='offload', daemon=True)
            self.thread.start()
        os.write(self.wake_write, b'.')

    def run(self):
        self.poll = select.epoll()
        self.poll.register(self.wake_read, select.EPOLLIN)
        closing = False
        while self.jobs or not closing:
            for fd, _ in self.poll.poll(self.next_deadline()):
                if fd == self.wake_read:
                    closing = b'q' in os.read(fd, 4096)
                    self.adopt()
                else:
                    self.step(fd)
            self.expire()

    def next_deadline(self):
        if not self.jobs:
            return None
        return max(0.0, min(job[2] for job in self.jobs.values()) - time.monotonic())

    def adopt(self):
        while self.inbox:
            fd, (job, event, seconds), done = self.inbox.popleft()
            self.jobs[fd] = [job, event, time.monotonic() + seconds, done]
            self.poll.register(fd, event)

    def step(self, fd):
        entry = self.jobs[fd]
        try:
            event, seconds = next(entry[0])
        except StopIteration:
            self.end(fd, True)
        except Exception as error:
            if not isinstance(error, (ConnectionError, ClientGone)):
                log(f'offload: {error}')
            self.end(fd, False)
        else:
            if event != entry[1]:
                self.poll.modify(fd, event)
            entry[1:3] = event, time.monotonic() + seconds

    def expire(self):
        now = time.monotonic()
        for fd in [fd for fd, entry in self.jobs.items() if entry[2] <= now]:
            self.end(fd, False)

    def end(self, fd, ok):
        job, _, _, done = self.jobs.pop(fd)
        job.close()
        self.poll.unregister(fd)
        done(fd, ok)

    def finish(self):
        """Wait until all jobs are done."""
        if self.thread is not None:
            os.write(self.wake_write, b'q')
            self.thread.join()


# ---------------------------------------------------------------------------------------------
# 9. Worker
#
# A worker is a process that serves. Core.serve() is the hot path; for a small request behind nginx
# it makes four system calls: accept4, read, write, close. With one socket and one thread it waits
# in accept() itself; there is no select before it, since the kernel wakes one waiting process for a
# connection. With several sockets, HTTP or threads, Core.wait() stands in for accept(): it watches
# listeners and kept HTTP connections at once, so that those that are silent or slow hold nobody.
#
# A stop must neither lose a connection nor wait for one. So the handler of the signal puts the end
# of a closed pipe in the place of the listening descriptor (dup2): the accept() that was
# interrupted is tried again by Python (PEP 475) and fails; a connection that came before is served.
# A signal between Python's check and the system call would go unnoticed until the next connection,
# which is why the master repeats it.

# A row of the scoreboard, one for each core, in shared memory: the last packet, then these numbers.
PID, READY, STARTED, REQUESTS, ERRORS, BYTES, BUSY, LEAVING = range(8)
NUMBERS = PACKET_MAX + 8 - PACKET_MAX % 8
ROW_SIZE = NUMBERS + 8 * 8


class Row:
    """What one core of a worker is doing; written by its worker, read by the master.

    The worker reads its packets right into the row, so that the master can name the request at
    which a worker died, and it costs nothing."""

    def __init__(self):
        self.memory = mmap.mmap(-1, ROW_SIZE)           # anonymous, shared over fork()
        self.packet = memoryview(self.memory)[:PACKET_MAX]
        self.numbers = memoryview(self.memory)[NUMBERS:].cast('d')

    def request(self):
        """'GET /path' of the request that is, or was last, in the works."""
        size = 4 + int.from_bytes(self.memory[1:3], 'little')
        if self.memory[0] > 32:                         # the first line of a request over HTTP
            return ' '.join(self.memory[:512].split(b'\r\n')[0].decode('latin-1').split(' ')[:2])
        try:
            variables = dict(unpack_vars(self.memory[4:size]))
        except BadRequest:
            return '?'
        return f"{variables.get('REQUEST_METHOD', '?')} {variables.get('REQUEST_URI', '?')}"

    def clear(self):
        self.numbers[:] = memoryview(bytes(64)).cast('d')


class Connection:
    """A client's connection over HTTP, between and during its requests."""

    __slots__ = ('fd', 'environ', 'data', 'deadline', 'events', 'fields', 'again')

    def __init__(self, fd, environ, deadline):
        self.fd, self.environ, self.deadline = fd, environ, deadline
        self.data = b''                                 # read, but not yet used
        self.events = 0                                 # what the worker's epoll watches it for; 0: nothing
        self.fields = None                              # of the last request, from HTTP/1.1 on: the bytes,
        self.again = None                               # and what gives a new environ with them


def left(fd):
    """Has the client closed its connection? One that only ended its sending side hasn't: POLLHUP is for both."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def strip_script_name(environ):
    """For modifier1 30: the web server left SCRIPT_NAME in front of PATH_INFO."""
    script, path = environ['SCRIPT_NAME'].rstrip('/'), environ['PATH_INFO']
    if script and (path == script or path.startswith(script + '/')):
        environ['SCRIPT_NAME'], environ['PATH_INFO'] = script, path[len(script):]


def plain_answer(status, why, more=''):
    """A whole response in plain text, for what the application can't answer."""
    text = f'{status}: {why}\n' if why else f'{status}\n'
    return (f'HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(text.encode())}\r\n'
            f'{more}Connection: close\r\n\r\n{text}').encode()


def close_hard(fd, ok=False):
    """Close a connection so that the client can't take the response for whole: by a reset, over TCP."""
    with socket.socket(fileno=fd) as connection:
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        except OSError:
            pass


def close_after(fd, ok):
    """The end of a job: close as is right."""
    os.close(fd) if ok else close_hard(fd)


def in_turn(*jobs):
    for job in jobs:
        yield from job


class Core:
    """What serves one request at a time: a worker with one thread has one, others one for each thread."""

    def __init__(self, worker, number):
        self.worker, self.number, self.config = worker, number, worker.config
        self.row, self.application = worker.rows[number], worker.application
        self.response = Response(self.config)
        self.ready = []                                 # events that wait() has still to look at
        self.second, self.date, self.pid = 0, '', os.getpid()
        self.next_second, self.usual_end = 0.0, ''      # HTTP: when its headers change, what they are
        self.requests = 0
        self.template = {
            'REQUEST_METHOD': 'GET', 'SCRIPT_NAME': '', 'PATH_INFO': '', 'QUERY_STRING': '', 'SERVER_NAME': 'localhost',
            'SERVER_PORT': '80', 'SERVER_PROTOCOL': 'HTTP/1.1', 'wsgi.version': (1, 0), 'wsgi.url_scheme': 'http',
            'wsgi.input': EmptyInput(), 'wsgi.errors': sys.stderr, 'wsgi.multithread': self.config.threads > 1,
            'wsgi.multiprocess': self.config.processes > 1, 'wsgi.run_once': False, 'wsgi.file_wrapper': FileWrapper,
            'wsgi.input_terminated': True, 'uwsgi.version': __version__.encode(), 'uwsgi.node': os.uname().nodename.encode()}
        self.expected = Expected(self.template)

    def serve(self, accept):
        """The hot path: connection after connection, until accept() fails because of a stop.

        What each request needs is a local variable; what is rare is in a method."""
        preadv, write, close, clock, nowait = os.preadv, os.write, os.close, time.monotonic, NOWAIT
        memory, packet, numbers = self.row.memory, [self.row.packet], self.row.numbers
        response, application, expected = self.response, self.application, self.expected
        start_response, logging = response.start_response, not self.config.disable_logging
        start, start_end, started_environ, started_pieces, new_environ, all_pieces, planned = expected.plan
        nothing, took, requests = self.template, 0.0, 0
        while True:
            try:
                fd, _ = accept()
            except OSError as error:
                if self.worker.must_stop(error):
                    return
                continue
            numbers[STARTED] = began = clock()
            response.fd, response.status, response.blocking = fd, None, True
            job = body = None
            environ, variables = nothing, 0
            try:
                if took > 0.1 and left(fd):             # it waited behind a slow request, perhaps for too long
                    raise ClientGone(0, 'before its turn')
                if not nowait:
                    os.set_blocking(fd, False)
                try:
                    got = preadv(fd, packet, -1, nowait)
                except BlockingIOError:
                    got = 0
                end = 4 + memory[1] + (memory[2] << 8)  # if got < 4: of an earlier packet, but at least 4
                if got < end or memory[0]:
                    got, end = self.receive(fd, got)

                text = memory[:end].decode('latin-1')
                simple = text[4:start_end] == start     # a GET without a query, as expected
                if simple:
                    environ, pieces, at = started_environ(), started_pieces, start_end
                else:
                    environ, pieces, at = new_environ(), all_pieces, 4
                for raw, size, name in pieces:
                    middle = at + size
                    if text[at:middle] != raw:
                        break
                    value = middle + 2
                    at = value + memory[middle]
                    if memory[middle + 1]:
                        at += memory[middle + 1] << 8
                    environ[name] = text[value:at]
                else:
                    raw = ''
                variables = planned
                if raw or at != end:                    # not what was expected
                    variables = expected.rest(environ, memory, text, at, raw)
                    start, start_end, started_environ, started_pieces, new_environ, all_pieces, planned = expected.plan
                if simple:
                    response.head_only = False
                else:
                    response.head_only = environ['REQUEST_METHOD'] == 'HEAD'
                    if memory[0]:
                        strip_script_name(environ)
                    if environ.get('CONTENT_LENGTH'):
                        body = self.open_body(environ, fd, memory[end:got])

                result = application(environ, start_response)
                if type(result) is list and len(result) == 1 and response.length == len(result[0]) < SMALL \
                        and not response.sent:
                    response.sent = True
                    response.size = response.length
                    data = response.head + result[0]
                    try:
                        sent = write(fd, data)
                    except ConnectionError:
                        raise ClientGone(0, 'before the response') from None
                    if sent < len(data):
                        response.send([data[sent:]])
                else:
                    job = response.finish(result)
            except BaseException as error:
                self.failed(error)
            if job is None and not response.ending and (body is None or not body.left):
                close(fd)
            else:
                self.let_go(fd, job, body, close_after)
            took = clock() - began
            requests += 1
            numbers[REQUESTS] = requests
            numbers[BUSY] += took
            if logging:
                self.log_request(environ, variables, memory[1] + (memory[2] << 8), took)
            response.sent = False
            numbers[STARTED] = 0.0

    # -- what is rare

    def receive(self, fd, got):
        """The head didn't come at once, or isn't for WSGI: read on. (bytes read, end of the packet)."""
        packet, deadline = self.row.packet, time.monotonic() + self.config.socket_timeout
        while got < 4:
            try:
                got += read_some(fd, packet[got:], deadline)
            except ClientGone as error:
                error.errno = error.errno if got else 0         # a connection that was only tried is no error
                raise
        if packet[0] == PING:
            os.write(fd, PONG)
            raise ClientGone(0, 'a ping')
        if packet[0] not in (WSGI, WSGI_STRIP):
            if bytes(packet[:3]).isalpha():
                raise BadRequest('this socket speaks the uwsgi protocol, and this is HTTP: in nginx use uwsgi_pass, '
                                 'not proxy_pass; for a browser use the option http-socket')
            raise BadRequest(f'modifier1 is {packet[0]}: only WSGI (0) is served here')
        end = 4 + packet[1] + (packet[2] << 8)
        while got < end:
            got += read_some(fd, packet[got:], deadline)
        return got, end

    def open_body(self, environ, fd, begun):
        """Set wsgi.input; the Body, which knows what wasn't read, unless all of it is here."""
        length = body_length(environ) if self.response.http else content_length(environ['CONTENT_LENGTH'])
        limit = self.config.limit_post
        if limit and length > limit:
            raise BadRequest(f'the body has {length} bytes, the option limit-post allows {limit}', '413 Content Too Large')
        if 0 <= length <= len(begun):
            environ['wsgi.input'] = io.BytesIO(begun[:length])
            return None
        if length < 0:
            body = ChunkedBody(fd, begun, self.config.socket_timeout, limit or float('inf'))
        else:
            body = Body(fd, begun, length, self.config.socket_timeout)
        environ['wsgi.input'] = io.BufferedReader(body, READ_MAX)
        return body

    def failed(self, error):
        """The one place where the exceptions of a request end."""
        response, numbers = self.response, self.row.numbers
        if isinstance(error, ClientGone):
            if response.status is None:
                response.status = '499'
            if error.errno:
                log(f'{self.row.request()}: {error.strerror}')
            if response.sent:
                response.ending = 'cut'
            return
        numbers[ERRORS] += 1
        if isinstance(error, BadRequest) and not response.sent:
            status, why, response.ending = error.status, str(error), 'drain'
            log(f'bad request: {why}')
        else:
            status, why = '500 Internal Server Error', ''
            log_exception(f'{self.row.request()}: the application failed')
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            self.worker.leave('the application called sys.exit()')
        if response.sent:
            response.cut('the response was begun')
            return
        answer = plain_answer(status, why, response.date.decode() if response.http else '')
        response.status, response.sent, response.keep = status, True, False
        response.head, response.headers, response.size = answer[:answer.index(b'\r\n\r\n') + 4], (1, 2, 3), len(status) + 1
        try:
            os.write(response.fd, response.head if response.head_only else answer)
        except OSError:
            pass

    def let_go(self, fd, job, body, done):
        """Close a connection that needs more than close(): `done` follows when all is sent and read."""
        response = self.response
        ending, response.ending = response.ending, ''
        if ending == 'drain' or body is not None and body.left:
            try:
                job = (in_turn(job[0], drain(fd)), *job[1:]) if job else run_a_while(fd, drain(fd))
            except OSError:
                job = None
            done = close_after
        if job is not None:
            self.worker.offloader.take(fd, job, close_hard if ending == 'cut' else done)
        else:
            done(fd, ending != 'cut')

    def log_request(self, environ, variables, size, took):
        """A line in uWSGI's format."""
        self.tell_time()
        response, get, total = self.response, environ.get, self.worker.total
        total[0] += 1
        status, head, headers = response.status or '500', response.head, len(response.headers)
        if not response.sent:
            head, headers = b'', 0
        line = (f"[pid: {self.pid}|app: 0|req: {int(self.row.numbers[REQUESTS])}/{total[0]}] {get('REMOTE_ADDR', '')} "
                f"({get('REMOTE_USER', '')}) {{{2 * variables} vars in {size} bytes}} [{self.date}] "
                f"{get('REQUEST_METHOD', '')} {get('REQUEST_URI', '')} => generated {response.size} bytes in "
                f"{int(took * 1000)} msecs ({get('SERVER_PROTOCOL', '')} {status[:3]}) {headers} headers in "
                f"{len(head)} bytes (1 switches on core {self.number})\n")
        try:
            os.write(2, line.encode('latin-1', 'replace'))
        except OSError:
            pass

    def tell_time(self):
        """Bring the texts of the time up to date; strftime() would heed the locale."""
        now = time.time()
        self.next_second = time.monotonic() + 1 - now % 1
        if int(now) != self.second:
            self.second, self.date = int(now), time.ctime(now)
            utc = time.asctime(time.gmtime(now))
            day = utc[8:10].replace(' ', '0')
            date = f'Date: {utc[:3]}, {day} {utc[4:7]} {utc[20:]} {utc[11:19]} GMT\r\n'
            self.response.date, self.usual_end = date.encode(), f'{date}Server: minuwsgi\r\n\r\n'

    # -- several listeners, HTTP, threads

    def wait(self):
        """Stands in for accept(): (descriptor, address) of the next connection that speaks uwsgi. HTTP is
        served meanwhile."""
        worker, connections, clock = self.worker, self.worker.connections, time.monotonic
        claim, poll = connections.pop, worker.poll.poll         # whoever has claimed a connection, alone uses it
        most = 1 if self.config.threads > 1 else 64     # threads must not hoard what others could do
        while True:
            busy = False
            while self.ready:
                fd, _ = self.ready.pop()
                connection = claim(fd, None)
                if connection is not None:
                    busy = True
                    self.serve_http(connection)
                    continue
                listener = worker.listeners.get(fd)
                if listener is None:
                    if fd == worker.stop_read:
                        time.sleep(0.01)                # it stays readable, for all threads to see
                    continue
                busy = True
                try:
                    new, address = listener.socket._accept()
                except BlockingIOError:                 # another worker was faster
                    continue
                if listener.protocol == 'uwsgi':
                    return new, address
                self.serve_http(worker.new_connection(new, listener, address, self.template))
            if worker.stopping or clock() >= worker.next_look:
                worker.look_at_time(busy)
            self.ready = poll(1 if connections else None, most)

    def serve_http(self, connection):
        """Read what came, and answer each request whose head is whole."""
        data = connection.data
        try:
            new = os.read(connection.fd, READ_MAX)
        except BlockingIOError:                         # nothing, but a request may have come with an earlier one
            if not data:
                return self.worker.park(connection)
        except OSError:
            return self.worker.forget(connection)
        else:
            if not new:
                return self.worker.forget(connection)
            if not data:                                # a head begins: it has socket-timeout in all
                connection.deadline = time.monotonic() + self.config.socket_timeout
            data += new
        while data:
            if data[:2] == b'\r\n':                     # some clients end a body so
                data = data.lstrip(b'\r\n')
                continue
            end = data.find(b'\r\n\r\n')
            if end < 0 and len(data) <= HEAD_MAX and not hopeless(data):
                break
            if not self.http_request(connection, data, end):
                return None
            data = connection.data
        connection.data = data
        return self.worker.park(connection)

    def http_request(self, connection, data, end):
        """Answer one request; False when the connection isn't ours any more."""
        fd, response, numbers = connection.fd, self.response, self.row.numbers
        numbers[STARTED] = began = time.monotonic()
        first = data[:512]
        self.row.memory[:len(first)] = first
        if began >= self.next_second:
            self.tell_time()
        job = body = None
        response.fd, response.status, response.blocking, response.head_only = fd, None, False, False
        response.http, response.end, response.keep = 'HTTP/1.1', self.usual_end, not self.worker.stopping
        response.has_date = response.has_server = False
        try:
            # A client mostly sends the same header lines again: then only the target is read, -4 us of 17.
            line_end = data.find(b'\r\n') - 9           # where ' HTTP/1.1' begins
            usual = data[line_end:end] == connection.fields and data[:5] == b'GET /' and response.keep
            if usual:
                target = data[4:line_end].decode('latin-1')
                path, _, query = target.partition('?')
                usual = line_end < LINE_MAX and target.isprintable() and not (
                    ' ' in target or '#' in target or '%' in path)
            if usual:
                environ = connection.again()
                environ['REQUEST_URI'] = target
                environ['PATH_INFO'] = path
                environ['QUERY_STRING'] = query
                connection.data = data[end + 4:]
            else:
                environ = connection.environ.copy()
                body = self.open_request(connection, environ, data, end)
            result = self.application(environ, response.start_response)
            if usual and type(result) is list and len(result) == 1 and response.length == len(result[0]) < SMALL \
                    and not (response.sent or response.has_date or response.has_server):
                response.sent = True
                response.size = response.length
                answer = response.head + result[0]
                try:
                    sent = os.write(fd, answer)
                except BlockingIOError:
                    sent = 0
                except ConnectionError:
                    raise ClientGone(0, 'before the response') from None
                if sent < len(answer):
                    job = run_a_while(fd, send_chunks(fd, [answer[sent:]], response.patience))
            else:
                job = response.finish(result)
        except BaseException as error:
            self.failed(error)
        keep = response.keep
        if body is not None and not body.left:
            connection.data = body.behind()
        if not keep and connection.data and not response.ending:
            response.ending = 'drain'                   # it has sent requests that nobody takes
        clear = job is None and not response.ending and (body is None or not body.left)
        if not clear:
            self.worker.lend(connection)
            self.let_go(fd, job, body, self.worker.take_back(connection) if keep else close_after)
        elif not keep:
            self.worker.forget(connection)
        now = time.monotonic()
        if clear and keep:                              # else it isn't ours any more
            connection.deadline = now + (self.config.socket_timeout if connection.data else self.config.http_timeout)
        self.requests += 1
        numbers[REQUESTS] = self.requests
        numbers[BUSY] += now - began
        if not self.config.disable_logging:
            self.log_request(environ, len(environ) - len(connection.environ), max(end, 0) + 4, now - began)
        response.sent, response.size, response.end, response.http, response.chunked = False, 0, '\r\n', False, False
        response.body = None
        numbers[STARTED] = 0.0
        return clear and keep

    def open_request(self, connection, environ, data, end):
        """Read a head into environ and prepare the response; the Body, unless all of it is here."""
        response = self.response
        response.head_only = data[:5] == b'HEAD '
        if not 0 <= end <= HEAD_MAX:
            raise BadRequest(*hopeless(data) or ('the head is too long', '431 Request Header Fields Too Large'))
        parse_head(data[:end], environ)
        response.http = environ['SERVER_PROTOCOL']
        response.keep = response.keep and keeps(environ)
        if self.worker.trusted and self.worker.trusts(environ['REMOTE_ADDR']):
            client_address(environ, self.worker.trusted)
        connection.data = data[end + 4:]
        if 'CONTENT_LENGTH' not in environ and 'HTTP_TRANSFER_ENCODING' not in environ:
            if response.keep and response.http == 'HTTP/1.1' and environ['REQUEST_METHOD'] == 'GET' \
                    and environ['REQUEST_URI'][0] == '/':
                connection.fields, connection.again = data[data.find(b'\r\n') - 9:end], environ.copy().copy
            return None
        rest, connection.data = connection.data, b''
        body = response.body = self.open_body(environ, response.fd, rest)
        if body is None:
            connection.data = rest[int(environ.get('CONTENT_LENGTH', '0')):]
        elif not rest and response.http == 'HTTP/1.1':
            body.wants_continue = environ.get('HTTP_EXPECT', '').lower() == '100-continue'
        return body


class Worker:
    """A process that serves: its cores, and what they share."""

    def __init__(self, config, listeners, application, rows, total, number, master):
        self.config, self.application, self.rows, self.total = config, application, rows, total
        self.number, self.master = number, master       # master: its pid, or None without one
        self.listeners = {listener.socket.fileno(): listener for listener in listeners}
        self.connections = {}                           # HTTP: descriptor -> Connection that waits; who serves
                                                        # one has taken it out, so that nobody else closes it
        self.stopping = False
        self.closing_at = 0.0                           # when a stopping worker leaves its kept connections
        self.waiting = None                             # at a stop: the listener, for those who wait already
        self.offloaders = [Offloader() for _ in range(max(1, config.offload_threads))]
        self.poll = self.stop_read = None
        self.next_look = 0.0
        self.trusted = config.trust_proxy

    @property
    def offloader(self):
        self.offloaders.append(self.offloaders.pop(0))
        return self.offloaders[0]

    def run(self):
        """Serve until told to stop."""
        self.dead_end, other_end = os.pipe()
        os.close(other_end)
        for number in signal.SIGTERM, signal.SIGHUP, signal.SIGIO:
            signal.signal(number, self.on_stop)
        cores = [Core(self, i) for i in range(self.config.threads)]
        listener, *others = self.listeners.values()
        if others or len(cores) > 1 or listener.protocol != 'uwsgi':
            accept = cores[0].wait
            self.watch()
        else:
            accept = listener.socket._accept            # gives a bare descriptor: -1.4 us against accept()
        threads = []
        for core in cores[1:]:
            import threading
            threads.append(threading.Thread(target=core.serve, args=(core.wait,), daemon=True))
            threads[-1].start()
        self.tell_master(READY)
        cores[0].serve(accept)
        if self.waiting is not None:
            cores[0].serve(self.waiting._accept)
        for thread in threads:
            thread.join()
        for offloader in self.offloaders:
            offloader.finish()

    def on_other_signal(self, number, _):
        """INT comes from a terminal to the whole group: the master decides. USR1: the log has a new file."""
        if number == signal.SIGUSR1 and self.config.logto:
            open_log(self.config.logto)
        elif number == signal.SIGUSR2:
            import faulthandler
            log(f"worker {self.number}: {self.rows[0].request()}")
            faulthandler.dump_traceback(2)

    def on_stop(self, number, _):
        """SIGTERM: everything ends, serve what waits. SIGHUP, SIGIO (the master died): others serve it."""
        if not self.stopping:                           # the master repeats its signal
            self.stopping, self.closing_at = True, time.monotonic() + 1
        if self.poll is not None:
            os.write(self.stop_write, b'.')
        for fd, listener in self.listeners.items():
            if self.poll is None:
                if number == signal.SIGTERM and self.waiting is None:
                    self.waiting = listener.socket.dup()
                    self.waiting.setblocking(False)     # for all that share it: they stop too
                os.dup2(self.dead_end, fd, inheritable=False)
            elif number != signal.SIGTERM:
                self.unwatch(fd)

    def must_stop(self, error):
        """After a failed accept(): is it because of a stop? Otherwise wait until it may go better."""
        if self.stopping:
            return True
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            log(f'worker {self.number}: accept: {error.strerror}')
            idle = sorted(connection.deadline for connection in list(self.connections.values()) if not connection.data)
            if idle:                                    # make room: a part of those that are silent the longest
                self.close_connections(lambda c: not c.data and c.deadline <= idle[len(idle) // 4])
            else:
                time.sleep(0.1)
        elif error.errno == errno.EAGAIN:               # workers with several sockets made it non-blocking
            select.select(list(self.listeners), [], [])
        return False

    def tell_master(self, what):
        """Set a number in the first row, and wake the master, which looks at all of them."""
        self.rows[0].numbers[what] = 1
        if self.master:
            os.kill(self.master, signal.SIGCHLD)

    def leave(self, why):
        """Ask to be replaced; goes on serving until then."""
        if not self.rows[0].numbers[LEAVING]:
            log(f'worker {self.number} (pid {os.getpid()}) leaves: {why}')
            self.tell_master(LEAVING)
            if not self.master:
                self.on_stop()

    # -- HTTP connections; with threads, an event is for one thread only (EPOLLONESHOT)

    def watch(self):
        """Set up what Core.wait() waits for."""
        self.poll = select.epoll()
        self.stop_read, self.stop_write = os.pipe()
        self.poll.register(self.stop_read, select.EPOLLIN)
        for fd, listener in self.listeners.items():
            listener.socket.setblocking(False)
            self.poll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)      # wakes one process, not all
        self.one_shot = select.EPOLLONESHOT if self.config.threads > 1 else 0

    def new_connection(self, fd, listener, address, template):
        os.set_blocking(fd, False)
        environ = dict(template, SERVER_NAME=listener.host, SERVER_PORT=listener.port, REMOTE_ADDR='', REMOTE_PORT='')
        if type(address) is tuple:
            environ.update(REMOTE_ADDR=address[0], REMOTE_PORT=str(address[1]))
        return Connection(fd, environ, time.monotonic() + self.config.http_timeout)

    def park(self, connection, events=select.EPOLLIN):
        """Wait for more from the client without a thread that waits, until connection.deadline."""
        fd = connection.fd
        self.connections[fd] = connection               # first: the event may come to another thread at once
        if connection.events != events:
            known, connection.events = connection.events, events
            (self.poll.modify if known else self.poll.register)(fd, events | self.one_shot)
        elif self.one_shot:
            self.poll.modify(fd, events | self.one_shot)

    def forget(self, connection):
        os.close(connection.fd)                         # epoll forgets it too

    def lend(self, connection):
        """The connection belongs to a job now."""
        if connection.events:
            connection.events = 0
            self.poll.unregister(connection.fd)

    def take_back(self, connection):
        """What a job does at its end with a connection that is kept."""
        def done(fd, ok):
            if not ok:
                return close_hard(fd)
            connection.deadline = time.monotonic() + self.config.http_timeout
            # A request that has come already brings no event any more; that there is room to write is one.
            return self.park(connection, select.EPOLLIN | (select.EPOLLOUT if connection.data else 0))
        return done

    def trusts(self, address):
        """Is this a proxy whose X-Forwarded-For counts?"""
        from ipaddress import ip_address
        return bool(address) and any(ip_address(address) in network for network in self.trusted)

    def look_at_time(self, busy):
        """Once a second: close connections whose time is up. At a stop: leave when nothing more comes."""
        now = time.monotonic()
        if self.stopping and now > self.closing_at:     # enough of new ones
            for fd in self.listeners:
                self.unwatch(fd)
        if self.stopping and not busy:
            if now > self.closing_at:                   # who is in the middle of a head may end it
                self.close_connections(lambda connection: not connection.data)
            if not self.connections:
                raise OSError(errno.ENOTSOCK, 'told to stop')
        if now >= self.next_look:
            self.next_look = now + 1
            self.close_connections(lambda connection: connection.deadline < now)

    def unwatch(self, fd):
        try:
            self.poll.unregister(fd)
        except OSError:                                 # it was already
            pass

    def close_connections(self, condition):
        for fd in [fd for fd, connection in list(self.connections.items()) if condition(connection)]:
            connection = self.connections.pop(fd, None)
            if connection is None:                      # another thread was faster
                continue
            if not condition(connection):               # and this is a new one with the same descriptor
                self.park(connection, connection.events)
                continue
            if connection.data:
                try:
                    os.write(fd, plain_answer('408 Request Timeout', 'the head took too long'))
                except OSError:
                    pass
            self.forget(connection)


# ---------------------------------------------------------------------------------------------
# 10. Master
#
# The master owns the sockets, loads the application, forks workers and waits. Its signal handlers
# do nothing; signal.set_wakeup_fd() makes each signal a byte in a pipe. One loop sleeps on that pipe
# and its next deadline, and then converges: whatever happened, it compares what is with what should
# be, and mends the difference. So a signal that comes twice, or two that merge, do no harm.
#
# Each worker has the read end of a lifeline, a pipe whose write end only the master holds. With
# O_ASYNC the kernel sends SIGIO when that end closes: when the master dies, however it dies.
#
# A reload never takes a working site down. A child loads the new configuration and application as a
# proof; if that fails, nothing else happens. Then the master executes itself anew with the same pid.
# It inherits the sockets and the old workers, which go on serving, and replaces them one by one.

class AppError(Exception):
    """The application can't be loaded."""


def load_application(config):
    """The WSGI application that the options name, with its mounts."""
    mounts = {}
    for mount in config.mount:
        prefix, equals, spec = mount.partition('=')
        if not equals:
            raise AppError(f'mount = {mount}: /prefix=module:callable is expected')
        mounts[prefix.rstrip('/')] = load_spec(spec, config)
    default = None
    if config.module:
        default = load_module(config.module, config.callable)
    elif config.wsgi_file:
        default = load_file(config.wsgi_file, config.callable)
    if default is None and not mounts:
        raise AppError('no application is named: set module = package.module:callable or wsgi-file = FILE')
    application = mounted(mounts, mounts.pop('', default), config.manage_script_name) if mounts else default
    return with_static_files(config, application)


def load_spec(spec, config):
    return (load_file if spec.endswith(('.py', '.wsgi')) else load_module)(spec, config.callable)


def load_module(spec, name):
    import importlib
    module, _, attribute = spec.partition(':')
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split('.')[0] == error.name.split('.')[0]:
            raise AppError(f'there is no module {error.name!r} in {sys.path[:3]} … (working directory '
                           f'{os.getcwd()}, Python {sys.executable}); see chdir, pythonpath, virtualenv') from None
        raise
    return find_callable(found, attribute or name, spec)


def load_file(name, attribute):
    import importlib.machinery
    import importlib.util
    file = os.path.abspath(name)
    if not os.path.isfile(file):
        raise AppError(f'there is no file {file}')
    module = 'wsgi_file_' + ''.join(c if c.isalnum() else '_' for c in os.path.basename(file).rpartition('.')[0])
    spec = importlib.util.spec_from_loader(module, importlib.machinery.SourceFileLoader(module, file))
    found = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return find_callable(found, attribute, name)


def find_callable(module, attribute, spec):
    """The application in a module: name, a.b, or factory()."""
    found, name = module, attribute[:-2] if attribute.endswith('()') else attribute
    try:
        for part in name.split('.'):
            found = getattr(found, part)
    except AttributeError:
        there = [n for n in ('application', 'app', 'create_app') if hasattr(module, n)]
        hint = f'; it has {there[0]!r}: set callable = {there[0]}' if there else ''
        raise AppError(f'{spec} has no {name!r}{hint}') from None
    return found() if name != attribute else found


def mounted(mounts, default, manage):
    """A WSGI application that passes each request on to the one mounted at its SCRIPT_NAME."""
    prefixes = sorted(mounts, key=len, reverse=True)

    def application(environ, start_response):
        script, path = environ['SCRIPT_NAME'], environ['PATH_INFO']
        if manage:
            for prefix in prefixes:
                if path == prefix or path.startswith(prefix + '/'):
                    environ['SCRIPT_NAME'], environ['PATH_INFO'] = script, _ = prefix, path[len(prefix):]
                    break
        found = mounts.get(script.rstrip('/'), default)
        if found is not None:
            return found(environ, start_response)
        start_response('404 Not Found', [('Content-Type', 'text/plain'), ('Content-Length', '27')])
        return [b'no application is mounted.\n']
    return application


class Child:
    """A worker as the master sees it."""

    def __init__(self, pid, number, rows, lifeline):
        self.pid, self.number, self.rows, self.lifeline = pid, number, rows, lifeline
        self.born = time.monotonic()
        self.old = rows is None                         # from before the reload: to be replaced
        self.kill_at = self.stop_at = math.inf          # deadlines: SIGKILL; repeat the stop
        self.stop_with = None                           # the signal that told it to stop

    def is_ready(self):
        return self.rows is None or bool(self.rows[0].numbers[READY])

    def must_go(self):
        return self.old or bool(self.rows[0].numbers[LEAVING])

    def request(self, now):
        """What it is doing: 'GET /path for 41 ms', or ''."""
        busy = [row for row in self.rows or () if row.numbers[STARTED]]
        return ', '.join(f'{row.request()} for {(now - row.numbers[STARTED]) * 1000:.0f} ms' for row in busy)


class Master:
    def __init__(self, config, listeners, application, arguments, start):
        self.config, self.listeners, self.application = config, listeners, application
        self.arguments, self.start = arguments, start   # for the reload: the command line, and where it was given
        self.children = {}                              # pid -> Child
        self.free = [[Row() for _ in range(config.threads)] for _ in range(2 * config.processes + 2)]
        self.total = memoryview(mmap.mmap(-1, 4096)).cast('Q')
        self.stopping = 0                               # how often we were told to
        self.proof = None                               # the pid of the child that tries a reload
        self.reload_wanted = False
        self.ever_ready = self.announced = False
        self.failures, self.not_before = 0, 0.0         # deaths in a row, and the end of the back-off
        self.exit_code = 0
        self.oom_kills = oom_kills()

    def run(self):
        self.signals, self.wake = os.pipe()
        os.set_blocking(self.signals, False)
        os.set_blocking(self.wake, False)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        while True:
            self.converge()
            if self.stopping and not self.children:
                break
            deadline = self.next_deadline()
            timeout = None if deadline == math.inf else max(0, deadline - time.monotonic())
            if select.select([self.signals], [], [], timeout)[0]:
                for number in os.read(self.signals, 4096):
                    self.on_signal(number)
        for listener in self.listeners:
            if self.config.vacuum:
                listener.vacuum()
        return self.exit_code

    def on_signal(self, number):
        if number == signal.SIGTERM and not self.config.die_on_term:
            number = signal.SIGHUP
        if number in (signal.SIGTERM, signal.SIGINT):
            self.stop()
        elif number == signal.SIGQUIT:
            self.stopping = 1
            self.stop()
        elif number == signal.SIGHUP and not self.stopping:
            self.reload_wanted = True
        elif number == signal.SIGUSR1 and self.config.logto:
            open_log(self.config.logto)
            self.tell_all(signal.SIGUSR1)
        elif number == signal.SIGUSR2:
            self.tell_all(signal.SIGUSR2)

    def stop(self):
        self.stopping += 1
        for child in self.children.values():
            if self.stopping > 1:
                child.kill_at = 0
            else:
                self.tell_to_stop(child, signal.SIGTERM)
        now = time.monotonic()
        waited = [f'worker {c.number} ({c.request(now)})' for c in self.children.values() if c.request(now)]
        log('stopping' + (' at once' if self.stopping > 1 else f", waiting for {', '.join(waited)}" if waited else ''))

    def tell_all(self, number):
        for pid in self.children:
            os.kill(pid, number)

    def tell_to_stop(self, child, number):
        """Ask a worker to end; repeat it, since the first may come just before its accept()."""
        now = time.monotonic()
        if child.stop_with is None:
            child.kill_at = now + self.config.worker_reload_mercy
        child.stop_with, child.stop_at = number, now + 0.1
        try:
            os.kill(child.pid, number)
        except ProcessLookupError:
            pass

    # -- one turn of the loop

    def converge(self):
        self.reap()
        now = time.monotonic()
        for child in self.children.values():
            if now >= child.kill_at:
                if self.stopping < 2:
                    log(f'worker {child.number} (pid {child.pid}) had {self.config.worker_reload_mercy} s to finish: '
                        f'killed{child.request(now) and " at "}{child.request(now)}')
                child.kill_at = now + 1
                os.kill(child.pid, signal.SIGKILL)
            elif now >= child.stop_at:
                self.tell_to_stop(child, child.stop_with)
        if self.stopping:
            return
        self.replace_workers(now)
        if self.reload_wanted and self.proof is None and not any(child.old for child in self.children.values()):
            self.try_reload()
        if not self.announced and self.children and all(
                child.is_ready() and not child.old for child in self.children.values()):
            self.announced = True
            log(f"ready: {'1 worker' if self.config.processes == 1 else f'{self.config.processes} workers'}"
                + (f' with {self.config.threads} threads' if self.config.threads > 1 else ''))

    def replace_workers(self, now):
        """Spawn what is missing, and one after the other a successor for each worker that must go."""
        starting = any(not child.is_ready() for child in self.children.values())
        for number in range(1, self.config.processes + 1):
            mine = [child for child in self.children.values() if child.number == number and not child.stop_with]
            fresh = [child for child in mine if not child.must_go()]
            stale = [child for child in mine if child.must_go()]
            if not fresh and now >= self.not_before and self.free and not (stale and starting):
                self.spawn(number)
                starting = True
            elif fresh and fresh[0].is_ready():
                for child in stale:
                    self.tell_to_stop(child, signal.SIGHUP)
        for child in self.children.values():            # the new configuration has fewer workers
            if child.number > self.config.processes and not child.stop_with and not starting:
                self.tell_to_stop(child, signal.SIGHUP)

    def next_deadline(self):
        deadlines = [min(child.kill_at, child.stop_at) for child in self.children.values()]
        missing = self.not_before > time.monotonic() and not self.stopping
        return min(deadlines + [self.not_before] * missing, default=math.inf)

    def spawn(self, number):
        """fork(), and all that belongs to it. The signals are blocked meanwhile: a signal to the young
        child would otherwise go into the pipe that it still shares with its parent."""
        rows = self.free.pop()
        for row in rows:
            row.clear()
        lifeline, hold = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        master = os.getpid()
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            os.close(lifeline)
            self.children[pid] = Child(pid, number, rows, hold)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return
        status = 1
        try:
            os.close(hold)
            status = self.become_worker(number, rows, lifeline, master)
        except BaseException:
            log_exception(f'worker {number} failed')
        finally:
            os._exit(status)

    def become_worker(self, number, rows, lifeline, master):
        """In the child: let go of what is the master's, load the application if it wasn't, serve."""
        import fcntl
        signal.set_wakeup_fd(-1)
        for fd in (self.signals, self.wake, *(child.lifeline for child in self.children.values())):
            os.close(fd)
        worker = Worker(self.config, self.listeners, self.application, rows, self.total, number, master)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGQUIT else worker.on_other_signal)
        signal.signal(signal.SIGIO, worker.on_stop)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if os.getppid() != master:                      # it died before the lifeline was set
            return 1
        if worker.application is None:
            worker.application = load_or_log(self.config)
            if worker.application is None:
                return EXIT_NO_APP
        worker.run()
        finish_process()
        return 0

    def reap(self):
        """Take note of all children that ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self.proof:
                self.after_proof(code)
            elif pid in self.children:
                self.bury(self.children.pop(pid), code)

    def bury(self, child, code):
        """A worker ended: say why if nobody asked it to, and slow down if that comes again and again."""
        now = time.monotonic()
        os.close(child.lifeline)
        self.ever_ready = self.ever_ready or child.is_ready()
        request, idle = child.request(now), child.rows is not None and not child.rows[0].numbers[REQUESTS]
        if child.rows is not None:
            self.free.append(child.rows)
        if child.stop_with:
            return
        if code == EXIT_NO_APP and not self.ever_ready:
            self.exit_code, self.stopping = code, 2
            for other in self.children.values():
                other.kill_at = 0
            return
        log(f'worker {child.number} (pid {child.pid}) died: {self.describe_exit(code)}'
            + (f', at {request}' if request else ', while idle'))
        self.failures = self.failures + 1 if idle and not request else 0
        if self.failures:
            delay = min(30, 0.5 * 2 ** (self.failures - 1))
            self.not_before = now + delay
            log(f'a new one comes in {delay:g} s')

    def describe_exit(self, code):
        if code >= 0:
            return f'exit status {code}'
        kills = oom_kills()
        memory = code == -signal.SIGKILL and kills > self.oom_kills
        self.oom_kills = kills
        return f"{signal.Signals(-code).name}{', by the OOM killer of the kernel: memory is short' if memory else ''}"

    # -- reload

    def try_reload(self):
        """First the proof: a child does what --check does."""
        self.reload_wanted = False
        log('reload: trying the new configuration and application')
        self.start.restore()
        self.proof = os.posix_spawn(sys.executable, [*self.start.command, '--check'], self.start.environment,
                                    setsigmask=(), setsigdef=SIGNALS)
        self.start.back()

    def after_proof(self, code):
        self.proof = None
        if self.stopping:
            return
        if code:
            log('reload: failed, see above; the old code goes on serving')
            return
        state = {'sockets': [(listener.address, listener.protocol, listener.socket.fileno(), listener.inode)
                             for listener in self.listeners],
                 'workers': [(child.pid, child.number, child.lifeline) for child in self.children.values()]}
        import json
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)       # until the new image has its handlers
        for fd in [socket[2] for socket in state['sockets']] + [worker[2] for worker in state['workers']]:
            os.set_inheritable(fd, True)
        self.start.restore()
        os.execve(sys.executable, self.start.command, {**self.start.environment, RELOADED: json.dumps(state)})

    def adopt(self, workers):
        """After the exec: the workers of the old image are still our children."""
        for pid, number, lifeline in workers:
            os.set_inheritable(lifeline, False)
            self.children[pid] = Child(pid, number, None, lifeline)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGCHLD)


def oom_kills():
    """How many processes the kernel has killed for want of memory, see proc(5)."""
    try:
        with open('/proc/vmstat') as file:
            return next((int(line.split()[1]) for line in file if line.startswith('oom_kill ')), 0)
    except OSError:
        return 0


def load_or_log(config):
    """The application, or None after its traceback was logged."""
    try:
        return load_application(config)
    except AppError as error:
        log(f'minuwsgi: {error}')
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        log_exception('minuwsgi: the application failed to load')
    return None


def finish_process():
    """The end of a worker: its threads and atexit functions, but not the interpreter's own
    dismantling, which would touch, and so copy, every page that is shared with the master."""
    import atexit
    if 'threading' in sys.modules:
        sys.modules['threading']._shutdown()
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except (OSError, ValueError):
            pass


# ---------------------------------------------------------------------------------------------
# 11. Command line

def demo(environ, start_response):
    """The application of example.ini: says who answered, and what it was asked. /file sends this file."""
    if environ['PATH_INFO'] == '/file':
        file = open(__file__, 'rb')
        start_response('200 OK', [('Content-Type', 'text/x-python'),
                                  ('Content-Length', str(os.fstat(file.fileno()).st_size))])
        return environ['wsgi.file_wrapper'](file)
    lines = [f'minuwsgi {__version__}: this is worker process {os.getpid()}.', '']
    lines += [f'{name} = {value}' for name, value in sorted(environ.items())]
    body = '\n'.join(lines + ['', '/file sends the source of the server.', '']).encode()
    start_response('200 OK', [('Content-Type', 'text/plain; charset=utf-8'), ('Content-Length', str(len(body)))])
    return [body]


class Start:
    """How the server was started, to start it again in the same way."""

    def __init__(self, arguments):
        self.environment = {name: value for name, value in os.environ.items() if name != RELOADED}
        original = getattr(sys, 'orig_argv', None)      # Python 3.10
        before = original[1:-len(sys.argv)] if original else []
        self.command = [sys.executable, *before, os.path.abspath(sys.argv[0]), *arguments]
        self.directory = os.open('.', os.O_RDONLY)

    def restore(self):
        self.here = os.open('.', os.O_RDONLY)
        os.fchdir(self.directory)

    def back(self):
        os.fchdir(self.here)
        os.close(self.here)


def curl(address, path='/'):
    """Ask a uwsgi server for a path, and print what it answers."""
    try:
        if ':' in address and '/' not in address:
            host, _, port = address.rpartition(':')
            connection = socket.create_connection((host.strip('[]') or '127.0.0.1', int(port)))
        else:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect('\0' + address[1:] if address[:1] == '@' else address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't connect to {address}: {getattr(error, 'strerror', None) or error}") from None
    name, _, query = path.partition('?')
    with connection:
        connection.sendall(pack_request({
            'REQUEST_METHOD': 'GET', 'REQUEST_URI': path, 'PATH_INFO': unquote(name), 'QUERY_STRING': query,
            'SERVER_PROTOCOL': 'HTTP/1.1', 'SERVER_NAME': 'localhost', 'SERVER_PORT': '80', 'HTTP_HOST': 'localhost'}))
        while data := connection.recv(READ_MAX):
            sys.stdout.buffer.write(data)
        sys.stdout.flush()


def prepare(config):
    """Make the process what the options ask for; what the application sees is in place then."""
    if config.umask is not None:
        os.umask(config.umask)
    if config.virtualenv:
        enter_virtualenv(config.virtualenv)
    for item in config.env:
        name, equals, value = item.partition('=')
        if not equals or not name:
            raise ConfigError(f'env = {item}: NAME=value is expected')
        os.environ[name.strip()] = value.strip()
    if config.chdir:
        try:
            os.chdir(config.chdir)
        except OSError as error:
            raise ConfigError(f'chdir = {config.chdir}: {error.strerror}') from None
    sys.path.insert(0, os.getcwd())
    sys.path[:0] = [os.path.abspath(directory) for directory in config.pythonpath]
    sys.modules.setdefault('minuwsgi', sys.modules[__name__])       # `module = minuwsgi:demo` is this file


def enter_virtualenv(directory):
    """Go on as the Python of a virtual environment, unless this is it."""
    directory = os.path.abspath(directory)
    if os.path.realpath(sys.prefix) == os.path.realpath(directory):
        return
    python = os.path.join(directory, 'bin', 'python')
    if not os.access(python, os.X_OK):
        there = os.path.isdir(directory)
        raise ConfigError(f"virtualenv = {directory}: {'it has no bin/python' if there else 'there is no such directory'}"
                          f'; make one with: python3 -m venv {directory}')
    os.execv(python, [python, os.path.abspath(sys.argv[0]), *sys.argv[1:]])


def bind(config, inherited):
    """All listeners; inherited: [(address, protocol, descriptor, inode)] from before a reload."""
    kept = {(address, protocol): (fd, inode) for address, protocol, fd, inode in inherited}
    listeners = []
    wanted = [(a, 'uwsgi') for a in config.socket] + [(a, 'http') for a in config.http_socket]
    for address, protocol in dict.fromkeys(wanted):
        fd, inode = kept.pop((address, protocol), (None, None))
        listeners.append(Listener(address, protocol, config, fd, tuple(inode) if inode else None))
    for (address, protocol), (fd, inode) in kept.items():           # the new configuration has it no more
        Listener(address, protocol, config, fd, tuple(inode) if inode else None).vacuum()
    if not listeners:
        raise ConfigError('no socket is named: set socket = PATH or http-socket = :8000')
    return listeners


def drop_privileges(config):
    """Become uid and gid, for good, see credentials(7)."""
    if not (config.uid or config.gid):
        return
    import pwd
    uid, gid = owner(f'{config.uid or ""}:{config.gid or ""}')
    if (os.getuid(), os.getgid()) == (uid if uid >= 0 else os.getuid(), gid if gid >= 0 else os.getgid()):
        return
    try:
        if gid < 0 and uid >= 0:
            gid = pwd.getpwuid(uid).pw_gid
        if gid >= 0:
            os.setgid(gid)
            try:
                os.initgroups(pwd.getpwuid(uid if uid >= 0 else os.getuid()).pw_name, gid)
            except KeyError:
                os.setgroups([])
        if uid >= 0:
            os.setuid(uid)
    except OSError as error:
        raise ConfigError(f'uid, gid: {error.strerror}: only root can become another user') from None
    if uid > 0 and 0 in os.getresuid():
        raise ConfigError('uid: the privileges of root could not be dropped')


def serve(config, start):
    """Bind, load, fork, wait: the server. Its exit code."""
    import json
    inherited = json.loads(os.environ.pop(RELOADED, '{"sockets": [], "workers": []}'))
    log(f"minuwsgi {__version__}, Python {sys.version.split()[0]}, pid {os.getpid()}{', reloaded' * bool(inherited['workers'])}")
    prepare(config)
    listeners = bind(config, inherited['sockets'])
    log('listening on ' + ', '.join(f'{listener.name} ({listener.protocol})' for listener in listeners))
    drop_privileges(config)
    application = None
    if not config.lazy_apps or not config.master:
        application = load_or_log(config)
        if application is None:
            return EXIT_NO_APP
    if not config.master:
        return serve_alone(config, listeners, application)
    gc.collect()
    gc.freeze()                                         # the workers' collections leave the shared pages alone
    master = Master(config, listeners, application, None, start)
    master.adopt(inherited['workers'])
    return master.run()


def serve_alone(config, listeners, application):
    """Without a master: this process is the worker."""
    rows = [Row() for _ in range(config.threads)]
    worker = Worker(config, listeners, application, rows, memoryview(bytearray(8)).cast('Q'), 1, None)
    signal.signal(signal.SIGINT, worker.on_stop)
    worker.run()
    for listener in listeners:
        if config.vacuum:
            listener.vacuum()
    return 0


def main(arguments):
    """Run the command line; returns the exit code."""
    try:
        if not arguments or '--help' in arguments or '-h' in arguments:
            print(usage())
            return 0 if arguments else EXIT_CONFIG
        if '--version' in arguments:
            print(__version__)
            return 0
        if arguments[0] == '--curl':
            curl(*arguments[1:3])
            return 0
        start = Start(arguments)
        config = load_config(arguments)
        for warning in config.warnings:
            log(warning)
        if config.errors:
            raise ConfigError('\n'.join(config.errors))
        if config.check:
            prepare(config)
            return EXIT_NO_APP if load_or_log(config) is None else 0
        return serve(config, start)
    except ConfigError as error:
        log(f'minuwsgi: {error}')
        return EXIT_CONFIG


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
