"""Tests of minuwsgi: what it promises, in the order of the module.

    python3 -m pytest test_minuwsgi.py                  all
    python3 -m pytest test_minuwsgi.py -k vacuum        those with a word in their name

A test starts the real server in a directory of its own and talks to it over real sockets. It waits
for events (a line in the log, the end of a process), never for time to pass. At its end the log
must hold no traceback that the test didn't ask for, and no process may be left.
"""
import contextlib
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parent
MINUWSGI = HERE / 'minuwsgi.py'
sys.path.insert(0, str(HERE))
import minuwsgi                                                             # noqa: E402

PATIENCE = 20                           # seconds after which an event that doesn't come is a failure

HELLO = '''
def application(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain'), ('Content-Length', '6')])
    return [b'hello\\n']
'''


# ---------------------------------------------------------------------------------------------
# Tools

class Answer:
    """A response that was read to the end of the connection."""

    def __init__(self, raw):
        self.raw = raw
        head, _, self.body = raw.partition(b'\r\n\r\n')
        lines = head.decode('latin-1').split('\r\n')
        self.status = lines[0].partition(' ')[2]
        self.headers = [tuple(line.split(': ', 1)) for line in lines[1:]]

    def header(self, name):
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    @property
    def text(self):
        return self.body.decode('latin-1')


def packet(path='/', body=b'', **variables):
    """A uwsgi packet such as nginx sends it, and the body."""
    name, _, query = path.partition('?')
    variables = {
        'QUERY_STRING': query, 'REQUEST_METHOD': 'POST' if body else 'GET', 'CONTENT_TYPE': '',
        'CONTENT_LENGTH': str(len(body)) if body else '', 'REQUEST_URI': path, 'PATH_INFO': name,
        'DOCUMENT_ROOT': '/usr/share/nginx/html', 'SERVER_PROTOCOL': 'HTTP/1.1', 'REQUEST_SCHEME': 'http',
        'REMOTE_ADDR': '127.0.0.1', 'REMOTE_PORT': '53422', 'SERVER_PORT': '80', 'SERVER_NAME': 'localhost',
        'HTTP_HOST': 'localhost', **variables}
    return minuwsgi.pack_request(variables) + body


def connect(address):
    """A connection to a path or to (host, port)."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    connection = socket.socket(family)
    connection.settimeout(PATIENCE)
    connection.connect(address)
    return connection


def read_all(connection):
    data = b''
    with contextlib.suppress(ConnectionResetError):
        while new := connection.recv(65536):
            data += new
    return data


def exchange(address, data):
    """Send bytes over a new connection and read until the server closes it."""
    with connect(address) as connection:
        connection.sendall(data)
        return read_all(connection)


def ask(address, path='/', body=b'', **variables):
    """Ask over the uwsgi protocol; an Answer."""
    return Answer(exchange(address, packet(path, body, **variables)))


def wait_until(condition, what='the condition'):
    """Wait until condition() is true; for what no event can be had for."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f'{what} did not come true'
        time.sleep(0.01)
    return value


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def children(pid):
    """The pids of a process's children."""
    found = []
    for entry in os.listdir('/proc'):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = pathlib.Path('/proc', entry, 'stat').read_text()
                if int(stat.rpartition(')')[2].split()[1]) == pid and stat.rpartition(')')[2].split()[0] != 'Z':
                    found.append(int(entry))
    return sorted(found)


class Server:
    """A running minuwsgi: `lines` is its log so far, `socket` the path where it speaks uwsgi,
    `http` the (host, port) where it speaks HTTP."""

    def __init__(self, directory, arguments, python=sys.executable, environment=(), **popen):
        self.directory, self.socket, self.http = directory, str(directory / 's'), None
        self.lines, self.tracebacks_expected = [], False
        self.changed = threading.Condition()
        self.process = subprocess.Popen([python, str(MINUWSGI), *map(str, arguments)], cwd=directory,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                        env={**os.environ, **dict(environment)}, **popen)
        self.pid = self.process.pid
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    def read_log(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line.decode(errors='replace').rstrip('\n'))
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    @property
    def log(self):
        return '\n'.join(self.lines)

    def wait_for(self, pattern, times=1):
        """Wait until `times` lines of the log match the regular expression; the last of them."""
        def matching():
            return [line for line in self.lines if re.search(pattern, line)]
        with self.changed:
            done = self.changed.wait_for(lambda: len(matching()) >= times or not self.reader.is_alive(), PATIENCE)
            assert done and len(matching()) >= times, f'{pattern!r} did not come {times} times in:\n{self.log}'
            return matching()[times - 1]

    def ready(self):
        self.wait_for('^ready')
        return self

    def ask(self, path='/', body=b'', **variables):
        return ask(self.socket, path, body, **variables)

    def get(self, target='/', headers='', method='GET', version='HTTP/1.1', body=b''):
        """Ask over HTTP, on a connection of its own."""
        head = f'{method} {target} {version}\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n'
        return Answer(exchange(self.http, head.encode('latin-1') + body))

    def workers(self):
        return children(self.pid)

    def kill(self, number):
        os.kill(self.pid, number)

    def wait(self):
        """The exit code, once the server has ended by itself."""
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code

    def stop(self, number=signal.SIGTERM):
        """Stop it; its exit code."""
        if self.process.poll() is None:
            self.kill(number)
        return self.wait()

    def end(self):
        """At the end of each test: nothing is left, nothing went wrong unnoticed."""
        left = self.workers()
        if self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.process.kill()
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f'the server did not stop:\n{self.log}') from None
        wait_until(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in left), 'the end of the workers')
        assert self.tracebacks_expected or 'Traceback' not in self.log, self.log


@pytest.fixture
def tmp():
    """A directory with a short name (that of a unix socket has at most 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix='mu') as name:
        os.chmod(name, 0o755)
        yield pathlib.Path(name)


@pytest.fixture
def start(tmp):
    """start(app, ini, *arguments) starts a server: the text of app.py, lines of the section [uwsgi].

    Where ini names no module it is app:application; where it names no socket, it is tmp/s; with
    `http=True` it speaks HTTP too, at a free port. `ready=False` doesn't wait for the workers."""
    servers = []

    def start(app=HELLO, ini='', *arguments, http=False, ready=True, **options):
        (tmp / 'app.py').write_text(textwrap.dedent(app))
        lines = ['[uwsgi]', *textwrap.dedent(ini).strip().splitlines()]
        names = [line.partition('=')[0].strip() for line in lines]
        if not {'module', 'wsgi-file', 'mount', 'wsgi', 'file'}.intersection(names):
            lines.append('module = app:application')
        if not {'socket', 'uwsgi-socket', 'http-socket', 'http'}.intersection(names):
            lines.append('socket = s')
        port = free_port() if http else None
        if http:
            lines.append(f'http-socket = 127.0.0.1:{port}')
        (tmp / 'app.ini').write_text('\n'.join(lines) + '\n')
        server = Server(tmp, ['app.ini', *arguments], **options)
        server.http = ('127.0.0.1', port)
        servers.append(server)
        return server.ready() if ready else server
    yield start
    for server in servers:
        server.end()


def run(tmp, *arguments, **options):
    """Run minuwsgi to its end: (exit code, its output)."""
    done = subprocess.run([sys.executable, str(MINUWSGI), *map(str, arguments)], cwd=tmp, text=True, timeout=PATIENCE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options)
    return done.returncode, done.stdout


def test_the_tools_work(start):
    server = start('def application(e, s):\n  s("200 OK", [])\n  return [e["PATH_INFO"].encode()]', http=True)
    assert server.ask('/abc').text == '/abc'
    assert server.get('/abc').text[3:7] == '/abc'
    assert server.stop() == 0


# ---------------------------------------------------------------------------------------------
# 1. Options and the INI dialect

UWSGI = os.path.expanduser('~/.cache/minuwsgi-peers/bin/uwsgi')
UWSGI = UWSGI if os.access(UWSGI, os.X_OK) else shutil.which('uwsgi') or ''
needs_uwsgi = pytest.mark.skipif(not os.access(UWSGI, os.X_OK), reason='there is no uwsgi to compare with')


def load(tmp, text, *arguments):
    """The Config of these lines of [uwsgi] in tmp/app.ini."""
    text = textwrap.dedent(text)
    (tmp / 'app.ini').write_text(text if '[uwsgi]' in text else '[uwsgi]\n' + text)
    return minuwsgi.load_config(['--ini', str(tmp / 'app.ini'), *arguments])


def lines_of(config):
    """'name = value' for each line from files, sorted (uWSGI has another order after an include)."""
    lines = '\n'.join(f'{s.name} = {s.value}' for s in config.settings if s.where != 'command line').split('\n')
    return sorted(line for line in lines if not line.startswith(('if', 'end', 'for')))


def said(config):
    """Warnings and errors, without the directory."""
    return [re.sub(r'^.*/', '', text.split(': ')[0]) + ': ' + text.partition(': ')[2]
            for text in config.warnings + config.errors]


def as_uwsgi_reads(file):
    """The same as uWSGI's own --show-config prints them."""
    process = subprocess.Popen([UWSGI, '--show-config', '--ini', str(file)], cwd=file.parent,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(5, process.kill)            # it may loop for ever over what it reads
    timer.start()
    with process:
        output = ''
        for line in process.stdout:
            if line.startswith(';end of'):
                break
            output += line
        process.kill()
        timer.cancel()
    lines = output.partition('[uwsgi]\n')[2].split('\n')[2:-1]           # the first are show-config and ini
    return sorted(line for line in lines if not line.startswith(('if', 'end', 'for')))


QUIRKS = r'''
    ; what stands in front of a section counts for nothing
    x = y
    [other]
    master = false
    [uwsgi]
    # a comment
      ; another, indented
    master
    bare =
    a=b=c
      padded	 =	 value with blanks	  
    quoted = "in quotes"
    backslash = one\
    two = 2
    # %n in a comment
    n = %n %s %e %d %c %p %o
    parts = %0|%1|%9|
    upper = %N %S %D %P %C %E
    section = [%x] %%percent %%(later)
    here = %v %h %k %u %U %g %G %j %i
    number = 7
    twice = %(number * 2) %(number + 1 * 2) %(number - 10) %(number / 2) %(number / 0) %(number ++)
    joined = %(number two) %(number nope)
    unknown = %(nope) $(NOPE_NOT_SET)
    before = %(after)
    after = behind
    environment = $(HOME)/x
    double = one
    double = two
    first = %(double)
    set = placed=by set
    set-ph = other=by set-ph
    seen = %(placed) %(other)
    content = @(content.txt)|
    named = @($(PWD_FOR_TEST)/content.txt)
    if-env = HOME
    in-env = %(_)
    endif =
    if-env = HOME=/nowhere
    not-taken = 1
    endif =
    if-not-env = NOPE_NOT_SET
    not-env = %(_)
    endif
    ifenv = NOPE_NOT_SET
    not-taken = 2
    end =
    if-opt = number
    opt = %(_)
    end-if =
    if-opt = number=7
    opt-value = %(_)
    end-if =
    if-not-opt = nope
    not-opt = 1
    endif =
    if-file = content.txt
    file = %(_)
    endif =
    if-not-file = .
    not-file = 1
    endif =
    if-dir = .
    dir = %(_)
    endif =
    if-exists = /
    exists = 1
    endif =
    for = a b  c
    in-for = x%(_)y
    endfor =
    for-times = 3
    time = %(_)
    end-for =
    for-readline = content.txt
    line = [%(_)]
    endfor =
    for-glob = *.txt
    glob = %(_)
    endfor =
    include = more.ini
    inherit = last.ini
    ini = more.ini:special
    ini = :extra
    end-of-file = %(from-more)
    [other]
    master = false
    [uwsgi]
    again = 1
'''


def directory_of_quirks(tmp):
    (tmp / 'content.txt').write_text('one\ntwo\n')
    (tmp / 'more.ini').write_text('[uwsgi]\nfrom-more = %n\n[special]\nspecial = 1\n[extra]\nextra = 1')
    (tmp / 'last.ini').write_text('[uwsgi]\nfrom-last = 1\n')
    (tmp / 'app.ini').write_text(textwrap.dedent(QUIRKS))


@needs_uwsgi
def test_every_quirk_of_the_dialect_is_read_as_uwsgi_reads_it(tmp, monkeypatch):
    monkeypatch.chdir(tmp)
    monkeypatch.setenv('PWD_FOR_TEST', str(tmp))
    directory_of_quirks(tmp)
    assert lines_of(minuwsgi.load_config(['--ini', str(tmp / 'app.ini')])) == as_uwsgi_reads(tmp / 'app.ini')


@pytest.mark.parametrize('line, attribute, expected', [
    ('processes = 4', 'processes', 4),
    ('workers=4', 'processes', 4),
    ('processes = 4 ; four', 'processes', 4),
    ('processes = 4\t# four', 'processes', 4),
    ('processes = %((2 * 2) + 1)', 'processes', 5),
    ('processes = 4x', 'processes', 4),
    ('processes = true', 'processes', 1),
    ('cheaper = true', 'cheaper', 0),
    ('harakiri = 0.5', 'harakiri', 0.5),
    ('harakiri = 30s', 'harakiri', 30),
    ('post-buffering = true', 'processes', 1),
    ('reload-on-rss = 100', 'reload_on_rss', 100),
    ('vacuum', 'vacuum', True),
    ('vacuum =', 'vacuum', True),
    ('vacuum = True ; yes', 'vacuum', True),
    ('vacuum = 0', 'vacuum', False),
    ('vacuum = No', 'vacuum', False),
    ('vacuum = whatever', 'vacuum', True),
    ('disable-logging = false', 'disable_logging', False),
    ('chmod-socket', 'chmod_socket', 0o666),
    ('chmod-socket = true', 'chmod_socket', 0o666),
    ('chmod-socket = 1', 'chmod_socket', 0o666),
    ('chmod = 0660', 'chmod_socket', 0o660),
    ('module = app:app  # the application', 'module', 'app:app'),
    ('module = "app"', 'module', '"app"'),
    ('daemonize = true', 'daemonize', 'true'),
    ('logto =', 'logto', None),
    ('logto = # nowhere', 'logto', None),
    ('chdir = /a;b#c', 'chdir', '/a;b#c'),
    ('env = A=b # c', 'env', ('A=b # c',)),
    ('env = A = b=c', 'env', ('A = b=c',)),
    ('log-format = %(addr) "%(method) %(uri)" # %%', 'log_format', '%(addr) "%(method) %(uri)" # %'),
    ('log-date = %Y-%m', 'log_date', '%Y-%m'),
    ('log-date = %%Y-%%m', 'log_date', '%Y-%m'),
    ('static-map = /a=b\nstatic-map = /c=d ; e', 'static_map', ('/a=b', '/c=d')),
    ('http_socket = :80', 'http_socket', (':80',)),
    ('protocol = http11', 'protocol', 'http'),
    ('processes = 2\nworkers = 3', 'processes', 3),
    ('set = processes=3', 'processes', 3),
    ('n = 3\nprocesses = %(n)', 'processes', 3),
    ('a = %(b)\nb = %(a)\nchdir = /%(a)', 'chdir', '/%(a)'),
])
def test_a_value_is_converted(tmp, line, attribute, expected):
    config = load(tmp, line)
    assert (getattr(config, attribute), config.errors) == (expected, [])


@pytest.mark.parametrize('line, message', [
    ('vaccum = true', "unknown option 'vaccum', did you mean 'vacuum'?"),
    ('vacum = true', "unknown option 'vacum', did you mean 'vacuum'?"),
    ('chmod-sock = 660', "unknown option 'chmod-sock', did you mean 'chmod-socket'?"),
    ('chown = a:b', "unknown option 'chown', did you mean 'chown-socket'?"),
    ('process = 2', "unknown option 'process', did you mean 'processes'?"),
    ('enable-thread', "unknown option 'enable-thread', did you mean 'enable-threads'?"),
    ('disable-write-exceptions = 1', 'did you mean \'disable-write-exception\'?'),
    ('b = 65535', "unknown option 'b', did you mean 'buffer-size'?"),
    ('Processes = 2', "unknown option 'Processes', did you mean 'processes'?"),
    ('qqq = 1', "unknown option 'qqq'"),
    ('http_socket = :80', "'http_socket' is written 'http-socket'"),
    ('processes = four', "'processes = four': a whole number greater than 0 is expected"),
    ('processes = 0', "'processes = 0': a whole number greater than 0 is expected"),
    ('harakiri = -1', "'harakiri = -1': a number of seconds is expected"),
    ('harakiri = soon', "'harakiri = soon': a number of seconds is expected"),
    ('chmod-socket = 999', "'chmod-socket = 999': an octal mode such as 660 is expected"),
    ('protocol = fastcgi', "'protocol = fastcgi': uwsgi or http is expected"),
    ('mount = /a', "'mount = /a': name=value is expected"),
    ('cheaper = true', 'cheaper = true: a whole number is expected; taken as 0'),
    ('daemonize = true', "daemonize = true: a path is expected; taken as true"),
    ('threads = 2 # two', "threads: a comment needs a line of its own, '# two' is left out"),
    ("module = 'app'", 'module: the quotes are a part of the value; leave them out'),
    ('chdir = /srv/{{ name }}', "chdir: a template that wasn't filled in"),
    ('{{ options }}', "'{{ options }}' is a template that wasn't filled in"),
    ('http = :$PORT', 'http: :$PORT: variables of the environment are written $(NAME)'),
    ('http = :$(NOPE_NOT_SET)', 'http: :$(NOPE_NOT_SET): there is no such variable in the environment'),
    ('static-map /a=b', "'static-map /a' is no option; is a = missing? static-map = /a=b"),
    ('env X = y', "'env X' is no option; is a = missing? env = X=y"),
    ('autostart = true', "'autostart' belongs to supervisord"),
    ('redirect_stderr = true', "'redirect_stderr' belongs to supervisord"),
    ('user = www', "'user' belongs to supervisord or systemd; here it's uid, gid, chdir, env"),
    ('uwsgi_pass unix:/tmp/s;', 'belongs to nginx'),
    ('server_name = x', "'server_name' belongs to nginx"),
    ('<<<<<<< HEAD', "'<<<<<<< HEAD' is a mark of a merge conflict: choose one side"),
    ('=======', "'=======' is a mark of a merge conflict: choose one side"),
    ('>>>>>>> branch', "'>>>>>>> branch' is a mark of a merge conflict: choose one side"),
    ('attach-daemon = celery', "'attach-daemon' isn't supported; instead: a systemd unit each"),
    ('ini = /nope.ini', "can't read /nope.ini: No such file or directory"),
    ('chdir = @(/nope)', "can't read /nope: No such file or directory"),
    ('chdir = @(exec://pwd)', '@(exec://pwd): only files can be read, nothing is run; set a variable before the start '
     'and use $(VARIABLE)'),
    ('ini = exec://cat', "can't read exec://cat: only files can be read"),
    ('if-env = HOME\nif-env = PATH\nendif', 'if-env within another block: there are no nested blocks'),
    ('exit = 3', 'the configuration says exit 3'),
])
def test_a_line_that_is_wrong_is_named_with_its_place_and_what_is_meant(tmp, line, message):
    texts = said(load(tmp, line))
    assert any(text.startswith('app.ini:') and text.endswith(message) for text in texts), texts


def test_all_mistakes_are_told_at_once_in_the_order_of_the_lines(tmp):
    config = load(tmp, 'vaccum = 1\nprocesses = four\nsocker = x\nmaster = true\nthreads = zero\n')
    assert [text.partition(' ')[0] for text in said(config)] == ['app.ini:2:', 'app.ini:4:', 'app.ini:3:', 'app.ini:6:']
    assert (len(config.warnings), len(config.errors)) == (2, 2)


@pytest.mark.parametrize('lines', ['base = /a\nchdir = %(base)/b', 'chdir = %(b c)\nb = /\nc = x',
                                   'user = 3\nchdir = %(user)', 'n = 2\nthreads = %((n * 2) + 1)',
                                   'set-ph = unused=1', 'x = 1\nif-not-opt = x=1\nendif',
                                   'x = 1\nif-env = NOPE_NOT_SET\nchdir = %(x)\nendif'])
def test_a_name_that_is_used_somewhere_is_a_variable_and_no_warning(tmp, lines):
    config = load(tmp, lines)
    assert config.warnings == [] and 'variable' in [s.fate for s in config.settings]


def test_strict_makes_unknown_options_errors(tmp):
    config = load(tmp, 'strict = true\nvaccum = 1\nbase = /\nchdir = %(base)')
    assert said(config)[1:] == ["app.ini:3: unknown option 'vaccum', did you mean 'vacuum'? (strict)"]
    assert run(tmp, 'app.ini')[0] == 1


@pytest.mark.parametrize('data', [b'[uwsgi]\r\nprocesses = 3\r\nvacuum\r\n',
                                  b'\xef\xbb\xbf[uwsgi]\nprocesses = 3\nvacuum',
                                  b'[uwsgi]\n\tprocesses\t=\t3\t\n  vacuum  ',
                                  b'\n\n[uwsgi]  \nvacuum\n[uwsgi]\nprocesses=3',
                                  b'[uwsgi] ; here\nvacuum = 1\nprocesses = 3\nenv = A=\xff\xfe'])
def test_line_ends_a_bom_tabs_and_odd_bytes_do_no_harm(tmp, data):
    (tmp / 'app.ini').write_bytes(data)
    config = minuwsgi.load_config([str(tmp / 'app.ini')])
    assert (config.processes, config.vacuum, config.warnings, config.errors) == (3, True, [], [])


def test_a_section_is_chosen_by_name_and_a_file_without_it_says_what_it_has(tmp):
    (tmp / 'a.ini').write_text('[dev]\nini = :base\nthreads = 2\n[base]\nprocesses = 3\n')
    config = minuwsgi.load_config([f'{tmp}/a.ini:dev'])
    assert (config.processes, config.threads, config.warnings) == (3, 2, [])
    (warning,) = minuwsgi.load_config([f'{tmp}/a.ini']).warnings
    assert 'no section [uwsgi]' in warning and f'{tmp}/a.ini:dev, {tmp}/a.ini:base' in warning


def test_a_file_that_includes_itself_is_read_once(tmp):
    config = load(tmp, f'processes = 2\nini = {tmp}/app.ini\nthreads = 2')
    assert [text for text in said(config) if text.endswith('was read already')] and config.threads == 2


def test_an_open_block_ends_with_its_file(tmp):
    config = load(tmp, 'if-env = NOPE_NOT_SET\nthreads = 2', '--processes', '3')
    assert (config.threads, config.processes) == (1, 3) and 'a block has no end' in config.warnings[0]


def test_the_command_line_wins_over_files_and_files_over_the_environment(tmp, monkeypatch):
    monkeypatch.setenv('UWSGI_THREADS', '5')
    monkeypatch.setenv('UWSGI_PROCESSES', '5')
    monkeypatch.setenv('UWSGI_OF_MY_OWN', 'x')
    config = load(tmp, 'processes = 2\nlisten = 10\nchdir = %(base)',
                  '-p', '3', '--liste=20', '--set', 'base=/b', '-M', '-C666')
    assert (config.processes, config.threads, config.listen, config.chdir) == (3, 5, 20, '/b')
    assert (config.master, config.chmod_socket, config.warnings) == (True, 0o666, [])


@pytest.mark.parametrize('arguments, attribute, expected', [
    (['app.py'], 'wsgi_file', 'app.py'),
    (['a.b:app'], 'module', 'a.b:app'),
    (['--enable-threads', 'a:app', '--buffer-size', '4096', '--http', ':80'], 'module', 'a:app'),
    (['--chmod-socket', '-w', 'a'], 'chmod_socket', 0o666),
    (['-s', '/tmp/s', '-w', 'a', '-p4'], 'processes', 4),
])
def test_arguments_are_options_files_and_applications(arguments, attribute, expected):
    assert getattr(minuwsgi.load_config(arguments), attribute) == expected


@pytest.mark.parametrize('arguments', [['--nope'], ['nonsense'], ['--processes'], ['nofile.ini']])
def test_an_argument_that_makes_no_sense_is_refused(tmp, arguments):
    code, output = run(tmp, *arguments)
    assert code == 1 and output.startswith('minuwsgi: ') and 'Traceback' not in output


FATES = {
    'used': 'master module socket http-socket harakiri max-requests cheaper touch-reload stats static-map logger mount '
            'py-autoreload daemonize2 safe-pidfile log-4xx if-env if-not-opt ifdir for-glob endif end include inherit '
            'import',
    'always': 'need-app enable-threads single-interpreter thunder-lock buffer-size ignore-sigpipe plugins-dir '
              'log-master no-orphans post-buffering close-on-exec2',
    'unsupported': 'attach-daemon smart-attach-daemon2 cron2 mules spooler-import cache2 route-if route emperor-tyrant '
                   'vassals-set alarm-log hook-asap exec-pre-app gevent async log-route log-encoder '
                   'websockets-max-size '
                   'enable-proxy-protocol http-websockets master-fifo legion-node fastrouter-to zerg ssl-option https2 '
                   'subscribe2 metric carbon snmp paste xml chroot fs-reload php-app jvm-main-class plugins',
    'unknown': 'vaccum domain name http_socket Master endiff if-nope',
}


def test_every_family_of_options_has_its_fate():
    wrong = [(name, expected, minuwsgi.fate(name)) for expected, names in FATES.items() for name in names.split()
             if minuwsgi.fate(name)[0] != expected]
    assert wrong == []
    assert minuwsgi.fate('plugin', 'python3')[0] == 'always'
    assert minuwsgi.fate('hook-master-start', 'unix_signal:15 gracefully_kill_them_all')[0] == 'always'


@needs_uwsgi
def test_every_option_of_uwsgi_has_a_fate_and_a_reason():
    output = subprocess.run([UWSGI, '--help'], stdout=subprocess.PIPE, text=True).stdout
    names = set(re.findall(r'^ +(?:-.\|)?--(\S+)', output, re.M))
    assert len(names) > 800
    assert [name for name in names if minuwsgi.fate(name)[0] == 'unknown'] == []
    assert [name for name in names if minuwsgi.fate(name)[0] != 'used' and not minuwsgi.fate(name)[1]] == []


def test_no_name_stands_twice_in_the_tables():
    rows = [row[0].split() for row in minuwsgi.OPTIONS if type(row) is tuple]
    rows += [row[0].split() for row in minuwsgi.NOT_NEEDED + minuwsgi.NOT_SUPPORTED]
    names = [name for row in rows for name in row]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_show_config_tells_the_fate_the_place_and_the_remark_of_each_line_and_no_secret(tmp):
    (tmp / 'app.ini').write_text(textwrap.dedent('''
        [uwsgi]
        base = /srv
        chdir = %(base)/app
        need-app = true
        attach-daemon = celery
        vaccum = true
        processes = 2
        workers = 3
        env = DATABASE=postgres://me:hunter22@db
        db_password = correct horse
        pyargv = --password %(db_password) $(API_TOKEN)
        '''))
    code, output = run(tmp, '--show-config', 'app.ini', '--threads', '2',
                       env={**os.environ, 'UWSGI_LISTEN': '50', 'API_TOKEN': 'tok-12345'})
    lines = [re.sub(' +', ' ', line) for line in output.splitlines()]
    assert code == 0
    for expected in ('used listen = 50 (environment UWSGI_LISTEN)', 'variable base = /srv (app.ini:3)',
                     'used chdir = /srv/app (app.ini:4)', 'used threads = 2 (command line)',
                     'always need-app = true (app.ini:5) a start without an application fails',
                     'unsupported attach-daemon = celery (app.ini:6) a systemd unit each',
                     "unknown vaccum = true (app.ini:7) unknown option 'vaccum', did you mean 'vacuum'?",
                     'used processes = 2 (app.ini:8) app.ini:9 overrides it', 'used workers = 3 (app.ini:9)',
                     'used env = DATABASE=*** (app.ini:10)', 'variable db_password = *** (app.ini:11)',
                     'used pyargv = --password *** *** (app.ini:12)'):
        assert expected in lines
    assert not re.search('hunter22|horse|tok-1', output)


def test_show_config_succeeds_with_a_configuration_that_could_not_start(tmp):
    (tmp / 'app.ini').write_text('[uwsgi]\nprocesses = four\nini = nope.ini\nlogto = @(exec://date)\nchdir = {{ x }}\n')
    code, output = run(tmp, '--show-config', 'app.ini')
    assert code == 0 and output.count('\n') == 6
    assert run(tmp, 'app.ini')[0] == 1


def test_check_says_all_errors_at_once(tmp):
    (tmp / 'app.ini').write_text('[uwsgi]\nprocesses = four\nchdir = /nope\nuid = nope-user\nsocket = /nope/s\n'
                                 'http-socket = :port\nvirtualenv = /nope-env\nmodule = nope_module\n')
    code, output = run(tmp, '--check', 'app.ini')
    assert code == 1
    for name in ('processes = four', 'chdir = /nope:', 'nope-user', '/nope/s', "'port' is no port", '/nope-env',
                 'nope_module'):
        assert any(name in line for line in output.splitlines() if line.startswith('minuwsgi: ')), (name, output)


def test_check_loads_the_application(tmp):
    (tmp / 'app.py').write_text(HELLO)
    assert run(tmp, '--check', 'app.py', '--socket', 's')[0] == 0
    assert not (tmp / 's').exists()
    (tmp / 'app.py').write_text('import nope_module\n')
    code, output = run(tmp, '--check', 'app.py', '--socket', 's')
    assert code == 22 and 'nope_module' in output
    assert run(tmp, '--check', 'app.py')[0] == 1        # no socket


def test_warnings_do_not_keep_a_server_from_starting(start):
    server = start(ini='vaccum = 1\nprocesses = 1 ; one\ncheaper = true\npost-buffering = true\ncron = 0 0 0 0 0 x\n')
    server.wait_for(r"^app.ini:2: unknown option 'vaccum', did you mean 'vacuum'\?$")
    assert server.ask().status == '200 OK' and len([line for line in server.lines if 'app.ini:' in line]) == 4


def test_the_small_options_of_the_start_do_what_they_say(start, tmp):
    (tmp / 'early.py').write_text('import sys\nsys.modules["marker"] = sys\n')
    (tmp / 'lib1').mkdir()
    (tmp / 'lib1' / 'found.py').write_text('')
    server = start('''
        import marker, os, sys, found, resource
        def application(environ, start_response):
            start_response('200 OK', [])
            return [repr((sys.argv[1:], os.getcwd(), resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                          sys.flags.optimize)).encode()]
        ''', '''
        import = early
        pythonpath = lib*
        pyargv = -c x.conf
        chdir2 = /
        print = hello from %n
        max-fd = 300
        optimize = 1
        add-header = X-One: 1
        add-header = X-Two: 2
        protocol = http
        socket = h
        uwsgi-socket = s
        ''')
    server.wait_for('^hello from app$')
    answer = server.ask()
    assert answer.text == repr((['-c', 'x.conf'], '/', 300, 1))
    assert answer.headers == [('X-One', '1'), ('X-Two', '2')]
    over_http = Answer(exchange(str(tmp / 'h'), b'GET / HTTP/1.0\r\n\r\n' * 1))
    assert (over_http.header('X-One'), over_http.header('X-Two')) == ('1', '2')


def test_http_keepalive_is_the_time_an_idle_connection_is_kept(start):
    server = start(ini='http-keepalive = 1', http=True)
    with connect(server.http) as connection:
        connection.sendall(b'GET / HTTP/1.1\r\nHost: a\r\n\r\n')
        began = time.monotonic()
        assert b'200 OK' in read_all(connection)        # to the end that the server makes
        assert 0.5 < time.monotonic() - began < 10


STYLES = {                              # files as people write them, and what must come out
    'django': ('''
        [uwsgi]
        project = shop
        base    = /srv
        chdir           = %(base)/%(project)
        home            = %(base)/env/%(project)
        module          = %(project).wsgi:application
        master          = true
        processes       = 5
        socket          = %(base)/%(project)/%(project).sock
        chmod-socket    = 664
        vacuum          = true
        ''', {'chdir': '/srv/shop', 'virtualenv': '/srv/env/shop', 'module': 'shop.wsgi:application',
              'socket': ('/srv/shop/shop.sock',), 'chmod_socket': 0o664}),
    'flask in docker': ('''
        [uwsgi]
        module=main:app
        http-socket=0.0.0.0:5000
        master
        die-on-term
        need-app
        enable-threads
        processes=%((%k * 0) + 2)
        threads=4
        ''', {'module': 'main:app', 'processes': 2, 'threads': 4, 'http_socket': ('0.0.0.0:5000',)}),
    'comments behind': ('''
        [uwsgi]
        processes = 4      ; one for each core
        harakiri = 60      # seconds
        lazy-apps = false  # save memory
        socket = /run/app.sock ; for nginx
        ''', {'processes': 4, 'harakiri': 60, 'lazy_apps': False, 'socket': ('/run/app.sock',)}),
    'bloomberg': ('''
        [uwsgi]
        strict = true
        master = true
        enable-threads = true
        vacuum = true
        single-interpreter = true
        die-on-term = true
        need-app = true
        disable-logging = true
        log-4xx = true
        log-5xx = true
        max-requests = 1000
        max-worker-lifetime = 3600
        reload-on-rss = 2048
        worker-reload-mercy = 60
        cheaper-algo = busyness
        processes = 128
        cheaper = 8
        cheaper-initial = 16
        cheaper-overload = 1
        cheaper-step = 16
        cheaper-busyness-multiplier = 30
        harakiri = 60
        auto-procname = true
        ''', {'strict': True, 'cheaper': 8, 'reload_on_rss': 2048, 'log_4xx': True, 'processes': 128}),
    'sections': ('''
        [uwsgi]
        ini = :common
        socket = :3031
        [common]
        wsgi-file = app.py
        master = 1
        [dev]
        ini = :common
        http = :8000
        ''', {'wsgi_file': 'app.py', 'socket': (':3031',), 'http_socket': ()}),
    'environment': ('''
        [uwsgi]
        if-env = NOPE_WORKERS
        processes = %(_)
        endif =
        if-not-env = NOPE_WORKERS
        processes = 3
        endif =
        if-env = TEST_VENV
        virtualenv = $(TEST_VENV)
        endif =
        http = :$(TEST_PORT)
        ''', {'processes': 3, 'virtualenv': '/venv', 'http_socket': (':8123',)}),
    'a mount for each': ('''
        [uwsgi]
        manage-script-name = true
        for = blog shop
        mount = /%(_)=/srv/%(_)/wsgi.py
        static-map = /%(_)/static=/srv/%(_)/static
        endfor =
        ''', {'mount': ('/blog=/srv/blog/wsgi.py', '/shop=/srv/shop/wsgi.py'), 'manage_script_name': True,
              'static_map': ('/blog/static=/srv/blog/static', '/shop/static=/srv/shop/static')}),
    'old server': ('''
        [uwsgi]
        uid = www-data
        gid = www-data
        plugins = python3
        pythonpath = ..
        file = /srv/app.wsgi
        callable = app
        daemonize = /var/log/%n.log
        pidfile = /run/%n.pid
        buffer-size = 32768
        post-buffering = 8192
        touch-reload = %p
        procname-prefix-spaced = [shop]
        ''', {'wsgi_file': '/srv/app.wsgi', 'daemonize': '/var/log/app.log', 'pidfile': '/run/app.pid',
              'procname_prefix_spaced': '[shop]', 'uid': 'www-data'}),
    'logs': ('''
        [uwsgi]
        logger = file:/tmp/app.log
        req-logger = stdio
        log-format = {"addr": "%(addr)", "uri": "%(uri)", "ms": %(msecs)}
        log-date = %%Y-%%m-%%d
        log-maxsize = 20971520
        logto2 = /tmp/%c.log
        log-x-forwarded-for
        ''', {'logger': ('file:/tmp/app.log',), 'log_date': '%Y-%m-%d', 'log_maxsize': 20971520,
              'log_format': '{"addr": "%(addr)", "uri": "%(uri)", "ms": %(msecs)}', 'log_x_forwarded_for': True}),
    'padded, with tabs': ('''
        [uwsgi]
        http\t\t\t= 127.0.0.1:8080
        uid\t\t\t= 1000
        wsgi-file\t= wsgi.py

        ignore-sigpipe\t\t\t= true
        ignore-write-errors\t\t= true
        disable-write-exception\t= true
        thunder-lock = 1
        ''', {'http_socket': ('127.0.0.1:8080',), 'uid': '1000', 'wsgi_file': 'wsgi.py'}),
    'booleans of all kinds': ('''
        [uwsgi]
        master = True
        vacuum = 1
        lazy = yes
        strict = false
        disable-logging = 0
        stats-http = off
        auto-procname
        ''', {'master': True, 'vacuum': True, 'lazy_apps': True, 'strict': False, 'disable_logging': False,
              'stats_http': False, 'auto_procname': True}),
    'cgi and static files': ('''
        [uwsgi]
        root_dir = /srv/www
        http-socket = :8080
        check-static = %(root_dir)
        static-index = index.html
        static-expires = /* 3600
        cgi = /cgi-bin=%(root_dir)/cgi-bin
        cgi-helper = .py=python3
        cgi-allowed-ext = .py
        ''', {'check_static': ('/srv/www',), 'static_index': ('index.html',), 'cgi': ('/cgi-bin=/srv/www/cgi-bin',)}),
}


@pytest.mark.parametrize('style', STYLES)
def test_a_file_as_people_write_it_is_understood(tmp, monkeypatch, style):
    monkeypatch.setenv('TEST_VENV', '/venv')
    monkeypatch.setenv('TEST_PORT', '8123')
    text, expected = STYLES[style]
    config = load(tmp, text)
    assert {name: getattr(config, name) for name in expected} == expected
    assert {s.fate for s in config.settings} <= {'used', 'always', 'variable'} and config.errors == []
    if os.access(UWSGI, os.X_OK) and style not in ('comments behind', 'flask in docker', 'logs', 'old server'):
        assert lines_of(config) == as_uwsgi_reads(tmp / 'app.ini')


def test_help_fits_two_screens():
    lines = minuwsgi.usage().splitlines()
    assert len(lines) <= 116 and max(map(len, lines)) <= 120
    names = minuwsgi.usage()
    assert [option.name for option in minuwsgi.ROWS if f'--{option.name}' not in names] == []


def options_as_markdown():
    """The table of options for the README."""
    lines = ['| option | value | default | meaning |', '|---|---|---|---|']
    for row in minuwsgi.OPTIONS:
        if type(row) is str:
            lines.append(f'| **{row}** | | | |')
            continue
        option = minuwsgi.Option(*row)
        names = ', '.join(f'`{name}`' for name in (*option.names, *option.short))
        default = '' if option.default in (None, (), '') else f'`{str(option.default).lower()}`'
        lines.append(f'| {names} | {option.kind.expected} | {default} | {option.meaning} |')
    return '\n'.join(lines)


def test_the_readme_has_the_table_of_options_as_the_module_has_it():
    readme = HERE / 'README.md'
    if not readme.exists() or '| option | value | default | meaning |' not in readme.read_text():
        pytest.skip('README.md has no table of options')
    assert options_as_markdown() in readme.read_text()
