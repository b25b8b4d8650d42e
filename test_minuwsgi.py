"""Tests of minuwsgi: what it promises, in the order of the module.

    python3 -m pytest test_minuwsgi.py                  all
    python3 -m pytest -n 3 test_minuwsgi.py             three at a time, with pytest-xdist
    python3 -m pytest test_minuwsgi.py -k vacuum        those with a word in their name
    python3 test_minuwsgi.py --bench | --fuzz N | --soak MINUTES
    python3 test_minuwsgi.py --soak 15                  mixed load, reloads and kills for 15 minutes

A test starts the real server in a directory of its own and talks to it over real sockets. It waits
for events (a line in the log, the end of a process), never for time to pass. At its end the log
must hold no traceback that the test didn't ask for, and no process may be left.
"""
import ast
import collections
import concurrent.futures
import configparser
import contextlib
import json
import grp
import hashlib
import http.client
import http.cookiejar
import importlib.util
import io
import os
import pathlib
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import symtable
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

HERE = pathlib.Path(__file__).resolve().parent
MINUWSGI = HERE / 'minuwsgi.py'
sys.path.insert(0, str(HERE))
import minuwsgi                                                             # noqa: E402

PATIENCE = float(os.environ.get('MINUWSGI_PATIENCE',
    20))     # seconds after which an event that doesn't come is a failure

# Each start would compile minuwsgi.py for 50 ms: with -m and this environment its bytecode is taken. An application's
# isn't written: it would be stale when a test changes the file twice in a second.
BYTECODE = tempfile.TemporaryDirectory(prefix='mu')
COMPILED = {'PYTHONPATH': str(HERE), 'PYTHONPYCACHEPREFIX': BYTECODE.name, 'PYTHONDONTWRITEBYTECODE': '1'}
subprocess.run([sys.executable, '-m', 'minuwsgi', '--version'], cwd=HERE, check=True, stdout=subprocess.DEVNULL,
               env={**os.environ, **COMPILED, 'PYTHONDONTWRITEBYTECODE': ''})

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
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ':' in address[0] else socket.AF_INET
    connection = socket.socket(family)
    connection.settimeout(PATIENCE)
    connection.connect(address)
    return connection


def read_all(connection):
    chunks = []
    with contextlib.suppress(ConnectionResetError):
        while new := connection.recv(1 << 18):
            chunks.append(new)
    return b''.join(chunks)


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


def alive(pid):
    """Does a process run? One that has ended and waits to be buried doesn't."""
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


class Server:
    """A running minuwsgi: `lines` is its log so far, `socket` the path where it speaks uwsgi,
    `http` the (host, port) where it speaks HTTP."""

    def __init__(self, directory, arguments, python=sys.executable, environment=(), program=('-m', 'minuwsgi'),
                 **popen):
        self.directory, self.socket, self.http = directory, str(directory / 's'), None
        self.lines, self.tracebacks_expected = [], False
        self.changed = threading.Condition()
        self.process = subprocess.Popen([python, *program, *map(str, arguments)], cwd=directory,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                        env={**os.environ, **COMPILED, **dict(environment)},
                                        **popen)
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
        wait_until(lambda: not any(alive(pid) for pid in left), 'the end of the workers')
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


@pytest.fixture(scope='module')
def shared():
    """shared(app) is a server that all tests of the module with the same application use."""
    servers = {}

    def shared(app, ini='', http=True):
        if (app, ini) not in servers:
            directory = pathlib.Path(tempfile.mkdtemp(prefix='mu'))
            (directory / 'app.py').write_text(app)
            port = free_port()
            (directory / 'app.ini').write_text(
                f'[uwsgi]\nsocket = s\nhttp-socket = 127.0.0.1:{port}\nmodule = app\n{ini}\n')
            servers[app, ini] = Server(directory, ['app.ini'])
            servers[app, ini].http = '127.0.0.1', port
        return servers[app, ini].ready()
    yield shared
    for server in servers.values():
        server.end()
        shutil.rmtree(server.directory)


@pytest.fixture
def apps(shared):
    """A server with the applications of APPS, one for each path."""
    return shared(APPS)


@pytest.fixture(scope='module')
def big_file():
    """A file of 30 MB."""
    with tempfile.TemporaryDirectory(prefix='mu') as name:
        path = pathlib.Path(name, 'big')
        path.write_bytes(os.urandom(1000000) * 30)
        yield path


def run(tmp, *arguments, **options):
    """Run minuwsgi to its end: (exit code, its output)."""
    environment = {**(options.pop('env', None) or os.environ), **COMPILED}
    done = subprocess.run([sys.executable, '-m', 'minuwsgi', *map(str, arguments)], cwd=tmp, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
                          timeout=PATIENCE, **options)
    return done.returncode, done.stdout


def test_the_tools_work(start):
    server = start('def application(e, s):\n  s("200 OK", [])\n  return [e["PATH_INFO"].encode()]', http=True)
    assert server.ask('/abc').text == '/abc'
    assert server.get('/abc').text == '/abc'
    assert server.stop() == 0


# ---------------------------------------------------------------------------------------------
# 1. Options and the INI dialect

UWSGI_BINARY = os.path.expanduser('~/.cache/minuwsgi-peers/bin/uwsgi')
UWSGI_BINARY = UWSGI_BINARY if os.access(UWSGI_BINARY, os.X_OK) else shutil.which('uwsgi') or ''
needs_uwsgi = pytest.mark.skipif(not os.access(UWSGI_BINARY, os.X_OK), reason='there is no uwsgi to compare with')
needs_root = pytest.mark.skipif(os.getuid() != 0 or not os.path.exists('/usr/bin/python3'),
                                reason='needs root, and /usr/bin/python3, which anybody can read')


def load(tmp, text, *arguments):
    """The Config of these lines of [uwsgi] in tmp/app.ini."""
    text = textwrap.dedent(text)
    (tmp / 'app.ini').write_text(text if '[uwsgi]' in text else '[uwsgi]\n' + text)
    return minuwsgi.Config(['--ini', str(tmp / 'app.ini'), *arguments])


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
    process = subprocess.Popen([UWSGI_BINARY, '--show-config', '--ini', str(file)], cwd=file.parent,
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
    here = %v %h %k %u %g
    number = 7
    twice = %(number * 2) %(number + 1 * 2) %(number - 10) %(number / 2) %(number / 0) %(number ++)
    joined = %(number two) %(number nope)
    my--var = dashed
    dashes = %(my--var) %(number++) %(number--) %(number --)
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
    assert lines_of(minuwsgi.Config(['--ini', str(tmp / 'app.ini')])) == as_uwsgi_reads(tmp / 'app.ini')


@pytest.mark.parametrize('line, attribute, expected', [
    ('processes = 4', 'processes', 4),
    ('workers=4', 'processes', 4),
    ('processes = 4 ; four', 'processes', 4),
    ('processes = 4\t# four', 'processes', 4),
    ('processes = %((2 * 2) + 1)', 'processes', 5),
    ('processes = 4x', 'processes', 4),
    ('processes = +4', 'processes', 4),
    ('processes = @(number.txt)', 'processes', 4),         # ' 4'
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
def test_a_value_is_converted(tmp, monkeypatch, line, attribute, expected):
    monkeypatch.chdir(tmp)
    (tmp / 'number.txt').write_text(' 4\n')
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
    ('logger = syslog', 'logger = syslog: file:PATH or stdio is expected; left out'),
    ('threads = 2 # two', "threads: a comment needs a line of its own, '# two' is left out"),
    ("module = 'app'", "module = 'app': the quotes are a part of the value; leave them out"),
    ('chdir = /srv/{{ name }}', "chdir = /srv/{{ name }}: a template that wasn't filled in"),
    ('{{ options }}', "'{{ options }}' is a template that wasn't filled in"),
    ('http = :$PORT', 'http = :$PORT: variables of the environment are written $(NAME)'),
    ('http = :$(NOPE_NOT_SET)', 'http = :$(NOPE_NOT_SET): there is no such variable in the environment'),
    ('processes = $N', 'processes = $N: variables of the environment are written $(NAME)'),
    ('static-map /a=b', "there is no '=' behind the name: write static-map = /a=b"),
    ('env X = y', "there is no '=' behind the name: write env = X=y"),
    ('http-socket :8000', "there is no '=' behind the name: write http-socket = :8000"),
    ('module: plain', "there is no '=' behind the name: write module = plain"),
    ('http-scoket = :8000', "'http-scoket' isn't supported; instead: nginx: location, rewrite, add_header, upstream, "
                            "gzip, TLS, did you mean 'http-socket'?"),
    ('vacuum = yess', 'vacuum = yess: true or false is expected; taken as True'),
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
    ('ini = /', "can't read /: Is a directory"),
    ('ini = http://x/y.ini', "can't read http://x/y.ini: No such file or directory; only files can be read"),
    ('ini = exec://cat', "can't read exec://cat: No such file or directory; only files can be read"),
    *((f'chdir = @({name})', f'chdir = @({name}): there is no such file to read, and nothing is run; '
       'set a variable before the start and use $(VARIABLE)') for name in ('/nope', 'exec://pwd')),
    ('if-env = HOME\nthreads = 2\nelse = 1\nthreads = 3\nendif',
     'there is no else (line 4): write a second block, with if-not-'),
    ('module = app;', "module: a comment needs a line of its own, ';' is left out"),
    ('chdir = %(base)/x', 'chdir = %(base)/x: there is no such option or variable'),
    ('home = ~/venv', 'home = ~/venv: nothing puts your home directory here, write it out'),
    ('http-socket = 8000', 'http-socket = 8000: this is a path; a port is written :8000'),
    ('env = "A=b"', 'env = ***: the quotes are a part of the value; leave them out'),
    ('env = A', "'env = ***': NAME=value is expected"),
    ('add-header = Connection Close', "'add-header = Connection Close': Name: value is expected"),
    ('cheaper-algo = busyness', 'cheaper-algo = busyness: spare or backlog is expected; taken as spare'),
    ('cheaper = 4\nprocesses = 4', 'cheaper does nothing: 4 has to be lower than processes = 4'),
    ('logger = file:logfile=/a,maxsize=9',
     'logger = file:logfile=/a,maxsize=9: file:PATH or stdio is expected; taken as /a'),
    ('logger = stdio\nlogger = file:/a', 'logger does nothing: there is one log, and that is /a'),
    ('logger = file:/a\nlogto = /b', 'logger does nothing: there is one log, and that is /b'),
    ('logto = /b\nreq-logger = stdio', 'req-logger does nothing: there is one log, and that is /b'),
    ('wsgi-file = app.py\nmodule = app', 'wsgi-file is for the case that module is not there'),
    ('wsgi file = app.py', "unknown option 'wsgi file', did you mean 'wsgi-file'?"),
    ('Chmod Socket = 660', "unknown option 'Chmod Socket', did you mean 'chmod-socket'?"),
    ('socket := :1', "unknown option 'socket :', did you mean 'socket'?"),
    ('timeout = 3', "unknown option 'timeout'"),
    ('if-env = HOME\nif-env = PATH\nendif', 'if-env in line 3 within another block: there are no nested blocks'),
])
def test_a_line_that_is_wrong_is_named_with_its_place_and_what_is_meant(tmp, line, message):
    texts = said(load(tmp, line))
    assert any(text.startswith('app.ini:') and text.endswith(message) for text in texts), texts


def test_only_of_a_log_is_it_said_that_there_is_another(tmp):
    assert said(load(tmp, 'procname = stdio\nlogto = /b')) == []


def test_all_mistakes_are_told_at_once_in_the_order_of_the_lines(tmp):
    config = load(tmp, 'vaccum = 1\nprocesses = four\nsocker = x\nmaster = true\nthreads = zero\n')
    assert [text.partition(' ')[0] for text in said(config)] == ['app.ini:2:', 'app.ini:4:', 'app.ini:3:', 'app.ini:6:']
    assert (len(config.warnings), len(config.errors)) == (2, 2)


@pytest.mark.parametrize('lines', ['base = /a\nchdir = %(base)/b', 'chdir = %(b c)\nb = /\nc = x',
                                   'user = 3\nchdir = %(user)', 'n = 2\nthreads = %((n * 2) + 1)',
                                   'cachedir = /\nchdir = %(cachedir)',
                                   'set-ph = unused=1', 'x = 1\nif-not-opt = x=1\nendif',
                                   'x = 1\nif-env = NOPE_NOT_SET\nchdir = %(x)\nendif'])
def test_a_name_that_is_used_somewhere_is_a_variable_and_no_warning(tmp, lines):
    config = load(tmp, lines)
    assert config.warnings == [] and 'variable' in [s.fate for s in config.settings]


@pytest.mark.parametrize('line', ['processes = 04', 'harakiri = 0.50', 'harakiri = 010'])
def test_a_number_may_be_written_in_any_way(tmp, line):
    assert load(tmp, line).warnings == []


def test_a_value_may_have_any_number_of_references(tmp):
    assert load(tmp, 'one = 1\npyargv = ' + '%(one)' * 3000).pyargv == '1' * 3000


def test_what_many_turns_of_a_loop_say_is_found_once(tmp):
    """To look for a similar name took 50 times as long as the rest."""
    def seconds(name):
        began = time.process_time()
        load(tmp, f'for-times = 9000\n{name} = 1\nendfor =')
        return time.process_time() - began
    assert seconds('vaccum') < 10 * seconds('vacuum')


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
    config = minuwsgi.Config([str(tmp / 'app.ini')])
    assert (config.processes, config.vacuum, config.warnings, config.errors) == (3, True, [], [])


def test_a_section_is_chosen_by_name_and_a_file_without_it_says_what_it_has(tmp):
    (tmp / 'a.ini').write_text('[dev]\nini = :base\nthreads = 2\n[base]\nprocesses = 3\n')
    config = minuwsgi.Config([f'{tmp}/a.ini:dev'])
    assert (config.processes, config.threads, config.warnings) == (3, 2, [])
    (warning,) = minuwsgi.Config([f'{tmp}/a.ini']).warnings
    assert 'no section [uwsgi]' in warning and f'{tmp}/a.ini:dev, {tmp}/a.ini:base' in warning
    (tmp / 'b.ini').write_text('[uwsgi:prod]\nprocesses = 3\n')
    (warning,) = minuwsgi.Config([f'{tmp}/b.ini']).warnings
    assert warning.endswith(f'try {tmp}/b.ini:uwsgi:prod')
    assert minuwsgi.Config([f'{tmp}/b.ini:uwsgi:prod']).processes == 3


def test_lines_in_front_of_the_sections_and_other_kinds_of_files_are_told(tmp):
    (tmp / 'a.ini').write_text('# mine\nprocesses = 3\nthreads = 2\n[uwsgi]\nvacuum = true\n')
    (warning,) = minuwsgi.Config([f'{tmp}/a.ini']).warnings
    assert f"{tmp}/a.ini:2: 'processes' and what follows stand in front of the first section" in warning
    (tmp / 'a.ini').write_text('uwsgi:\n  processes: 3\n')
    (warning,) = minuwsgi.Config([f'{tmp}/a.ini']).warnings
    assert warning.endswith('there is no section [uwsgi], put a line [uwsgi] in front of its options')
    (tmp / 'a.ini').write_bytes('[uwsgi]\nprocesses = 3\n'.encode('utf-16'))
    with pytest.raises(minuwsgi.ConfigError, match='a.ini: this is no text in UTF-8'):
        minuwsgi.Config([f'{tmp}/a.ini'])


def test_a_file_that_includes_itself_is_read_once(tmp):
    config = load(tmp, f'processes = 2\nini = {tmp}/app.ini\nthreads = 2')
    assert [text for text in said(config) if text.endswith('was read already')] and config.threads == 2


def test_an_open_block_ends_with_its_file(tmp):
    config = load(tmp, 'if-env = NOPE_NOT_SET\nthreads = 2', '--processes', '3')
    assert (config.threads, config.processes) == (1, 3) and 'a block has no end' in config.warnings[0]


@pytest.mark.parametrize('line, attribute, expected', [
    ('logger = file:logs/a', 'logto', '/sub/logs/a'), ('daemonize2 = a', 'logto', '/sub/a'),
    ('req-logger = file:a', 'req_logger', ['/sub/a']), ('safe-pidfile = a', 'pidfile', '/sub/a'),
    ('logto2 = a', 'logto', os.path.abspath('a')), ('pidfile = a', 'pidfile', os.path.abspath('a'))])
def test_logs_and_pidfiles_are_where_uwsgi_has_them(tmp, line, attribute, expected):
    assert getattr(load(tmp, f'{line}\nchdir = /sub'), attribute) == expected


def test_the_command_line_wins_over_files_and_files_over_the_environment(tmp, monkeypatch):
    monkeypatch.setenv('UWSGI_THREADS', '5')
    monkeypatch.setenv('UWSGI_PROCESSES', '5')
    monkeypatch.setenv('UWSGI_OF_MY_OWN', 'x')
    config = load(tmp, 'processes = 2\nlisten = 10\nchdir = %(base)',
                  '-p', '3', '--listen=20', '--set', 'base=/b', '-M', '-C666')
    assert (config.processes, config.threads, config.listen, config.chdir) == (3, 5, 20, '/b')
    assert (config.master, config.chmod_socket, config.warnings) == (True, 0o666, [])


@pytest.mark.parametrize('arguments, attribute, expected', [
    (['app.py'], 'wsgi_file', 'app.py'),
    (['a.b:app'], 'module', 'a.b:app'),
    (['--enable-threads', 'a:app', '--buffer-size', '4096', '--http', ':80'], 'module', 'a:app'),
    (['--chmod-socket', '-w', 'a'], 'chmod_socket', 0o666),
    (['--log-date', '%Y-%m-%d %H:%M:%S', 'a.py'], 'log_date', '%Y-%m-%d %H:%M:%S'),
    (['--log-date', '-w', 'a'], 'log_date', ''), (['--log-date', 'a.py'], 'wsgi_file', 'a.py'),
    (['--strict', '--set-placeholder', 'a=b', '--set-ph', 'c=d'], 'errors', []),
    (['-s', '/tmp/s', '-w', 'a', '-p4'], 'processes', 4),
])
def test_arguments_are_options_files_and_applications(arguments, attribute, expected):
    assert getattr(minuwsgi.Config(arguments), attribute) == expected


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
    output = subprocess.run([UWSGI_BINARY, '--help'], stdout=subprocess.PIPE, text=True).stdout
    names = set(re.findall(r'^ +(?:-.\|)?--(\S+)', output, re.M))
    assert len(names) > 800
    assert [name for name in names if minuwsgi.fate(name)[0] == 'unknown'] == []
    assert [name for name in names if minuwsgi.fate(name)[0] != 'used' and not minuwsgi.fate(name)[1]] == []


def test_no_name_stands_twice_in_the_tables():
    names = [name for option in minuwsgi.ROWS for name in option.names]
    names += [name for _, (patterns, _) in minuwsgi.table(minuwsgi.FATES) for name in patterns.split()]
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
                     "unsupported attach-daemon = celery (app.ini:6) 'attach-daemon' isn't supported; "
                     'instead: a systemd unit each',
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


def test_show_config_in_the_file_prints_and_starts(start):
    server = start(ini='show-config = true')
    assert server.wait_for('^used  *show-config') and server.ask().status == '200 OK'


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


def test_check_takes_a_pidfile_from_before_chdir(tmp):
    (tmp / 'site').mkdir()
    (tmp / 'run').mkdir()
    (tmp / 'site' / 'app.py').write_text(HELLO)
    assert run(tmp, '--check', '--module', 'app', '--socket', 's', '--chdir', 'site', '--pidfile', 'run/p')[0] == 0


@pytest.mark.parametrize('option, words', [
    ('--stats=/nope/s', "can't bind /nope/s"), ('--stats=x://1', "can't bind x://1"),
    ('--req-logger=file:/nope/log', '/nope/log: there is no such directory'),
    ('--uid=54321', 'uid = 54321: nothing is known of this user')])
def test_check_sees_what_a_start_sees(tmp, option, words):
    (tmp / 'app.py').write_text(HELLO)
    code, output = run(tmp, '--check', 'app.py', '--socket', 's', option)
    assert code == 1 and words in output


def test_warnings_do_not_keep_a_server_from_starting(start):
    server = start(ini='vaccum = 1\nprocesses = 1 ; one\ncheaper = true\npost-buffering = true\ncron = 0 0 0 0 0 x\n')
    server.wait_for(r"^app.ini:2: unknown option 'vaccum', did you mean 'vacuum'\?$")
    assert server.ask().status == '200 OK' and len([line for line in server.lines if 'app.ini:' in line]) == 4


def test_the_small_options_of_the_start_do_what_they_say(start, tmp):
    (tmp / 'early.py').write_text('import sys\nsys.modules["marker"] = sys\n')
    for lib in 'lib1', 'lib2':
        (tmp / lib).mkdir()
        (tmp / lib / 'found.py').write_text('')
    server = start('''
        import marker, os, sys, found, resource
        def application(environ, start_response):
            start_response('200 OK', [])
            lib = os.path.basename(os.path.dirname(found.__file__))
            return [repr((sys.argv[1:], os.getcwd(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], lib)).encode()]
        ''', '''
        import = early
        pythonpath = lib*
        pyargv = -c x.conf
        chdir2 = /
        print = hello from %n
        max-fd = 300
        add-header = X-One: 1 €
        add-header = X-Two: 2
        protocol = http
        socket = h
        uwsgi-socket = s
        ''')
    server.wait_for('^hello from app$')
    answer = server.ask()
    assert answer.text == repr((['-c', 'x.conf'], '/', 300, 'lib2'))
    assert answer.headers == [('X-One', '1 €'.encode().decode('latin-1')), ('X-Two', '2')]
    over_http = Answer(exchange(str(tmp / 'h'), b'GET / HTTP/1.0\r\n\r\n' * 1))
    assert set(answer.headers) <= set(over_http.headers)


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
        ''', {'logger': ('/tmp/app.log',), 'log_date': '%Y-%m-%d', 'log_maxsize': 20971520,
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
    if os.access(UWSGI_BINARY, os.X_OK) and style not in ('comments behind', 'flask in docker', 'logs', 'old server'):
        assert lines_of(config) == as_uwsgi_reads(tmp / 'app.ini')


def test_help_fits_two_screens():
    lines = minuwsgi.usage().splitlines()
    assert len(lines) <= 116 and max(map(len, lines)) <= 120
    names = minuwsgi.usage()
    assert [option.name for option in minuwsgi.ROWS if f'--{option.name}' not in names] == []


def options_as_markdown():
    """The table of options for the README."""
    lines = ['| option | value | default | meaning |', '|---|---|---|---|']
    for option, before in zip(minuwsgi.ROWS, [None, *minuwsgi.ROWS]):
        if not before or before.group != option.group:
            lines.append(f'| **{option.group}** | | | |')
        names = ', '.join(f'`{name}`' for name in option.names)
        default = '' if option.default in (None, (), '') else f'`{str(option.default).lower()}`'
        lines.append(f'| {names} | {option.expected} | {default} | {option.meaning} |')
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------------------
# 3. Sockets

class TestSockets:
    """A socket has the mode and the owner that were asked for, and nobody else's is touched."""

    @pytest.mark.parametrize('ini, mode', [
        ('', 0o660), ('chmod-socket = 600', 0o600), ('chmod-socket = 0666', 0o666), ('chmod-socket', 0o666),
        ('umask = 077\nchmod-socket = 664', 0o664)])
    def test_the_mode_is_exact_from_the_first_moment(self, start, ini, mode):
        server = start(ini=ini)
        assert os.stat(server.socket).st_mode & 0o777 == mode

    @pytest.mark.skipif(os.getuid() != 0, reason='needs root')
    def test_the_owner_is_the_one_that_was_asked_for(self, start):
        server = start(ini='chown-socket = nobody:daemon')
        import grp
        import pwd
        stat = os.stat(server.socket)
        assert (stat.st_uid, stat.st_gid) == (pwd.getpwnam('nobody').pw_uid, grp.getgrnam('daemon').gr_gid)

    def test_several_sockets_at_once(self, start, tmp):
        port, name = free_port(), f'@mu{os.getpid()}'
        server = start(ini=f'socket = s\nsocket = {tmp}/t\nsocket = :{port}\nsocket = {name}', http=True)
        for address in server.socket, str(tmp / 't'), ('127.0.0.1', port), '\0' + name[1:]:
            assert ask(address).body == b'hello\n'
        assert server.get().body == b'hello\n'

    def test_ipv6(self, start):
        port = free_port()
        start(ini=f'http-socket = [::1]:{port}')
        with socket.create_connection(('::1', port)) as connection:
            connection.sendall(b'GET / HTTP/1.0\r\n\r\n')
            assert read_all(connection).endswith(b'hello\n')

    def test_a_stale_socket_is_taken_over(self, start, tmp):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp / 's'))
        assert start().ask().body == b'hello\n'

    def test_a_living_servers_socket_is_refused_with_its_pid(self, start, tmp):
        server = start()
        code, output = run(tmp, 'app.ini')
        assert code == 1 and f'pid {server.pid} ' in output and 'another server listens there' in output
        assert server.ask().body == b'hello\n'

    def test_a_living_servers_socket_where_too_many_wait_is_refused_too(self, tmp):
        with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
            other.bind(str(tmp / 's'))
            other.listen(0)
            client.connect(str(tmp / 's'))
            code, output = run(tmp, '--socket', 's', 'minuwsgi:demo')
            assert code == 1 and 'another server listens there' in output and (tmp / 's').exists()

    @pytest.mark.parametrize('make', [
        lambda path: path.write_text('precious'), lambda path: path.mkdir(), lambda path: path.symlink_to('elsewhere')])
    def test_what_is_no_socket_is_never_removed(self, tmp, make):
        make(tmp / 's')
        code, output = run(tmp, '--socket', 's', '--module', 'minuwsgi:demo')
        assert code == 1 and "isn't a socket" in output and os.path.lexists(tmp / 's')

    def test_a_taken_port_is_an_error_in_words(self, start, tmp):
        server = start(http=True)
        code, output = run(tmp, '--http-socket', '%s:%d' % server.http, '--module', 'minuwsgi:demo')
        assert code == 1 and f"can't bind 127.0.0.1:{server.http[1]}: Address already in use; ss -ltnp" in output

    @pytest.mark.parametrize('address, words', [
        ('nowhere/s', 'there is no directory'), ('x' * 120, 'path too long'),
        ('127.0.0.1:http', 'is no port'),
        ('256.1.1.1:80', "can't bind"), ('fd://99', "can't bind"), ('127.0.0.1:70000', 'is no port')])
    def test_an_address_that_cannot_be_bound_is_told(self, tmp, address, words):
        code, output = run(tmp, '--socket', address, '--module', 'minuwsgi:demo')
        assert code == 1 and words in output and 'Traceback' not in output

    def test_a_queue_longer_than_the_kernel_allows_is_one_warning(self, start):
        most = int(pathlib.Path('/proc/sys/net/core/somaxconn').read_text())
        server = start(ini=f'listen = {most + 1}')
        assert server.log.count('net.core.somaxconn') == 1
        assert server.ask().body == b'hello\n'

    def test_vacuum_removes_the_socket_and_the_pidfile(self, start, tmp):
        server = start(ini='vacuum = true\npidfile = p')
        assert int((tmp / 'p').read_text()) == server.pid
        assert server.stop() == 0
        assert not os.path.exists(server.socket) and not (tmp / 'p').exists()

    def test_without_vacuum_the_socket_stays(self, start):
        server = start()
        assert server.stop() == 0
        assert os.path.exists(server.socket)

    def test_vacuum_spares_a_socket_that_is_not_ours(self, start):
        server = start(ini='vacuum = true')
        os.unlink(server.socket)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(server.socket)
        assert server.stop() == 0
        assert os.path.exists(server.socket)

    def test_vacuum_after_a_reload_still_knows_its_socket(self, start):
        server = start(ini='vacuum = true')
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.stop() == 0
        assert not os.path.exists(server.socket)


# ---------------------------------------------------------------------------------------------
# 4. The uwsgi protocol

def block(*items):
    """Sizes and texts as they stand in a packet's block."""
    return b''.join(len(item).to_bytes(2, 'little') + item for item in items)


def frame(data, modifier1=0, size=None):
    return bytes([modifier1]) + (len(data) if size is None else size).to_bytes(2, 'little') + b'\0' + data


ENVIRON_APP = '''
def application(environ, start_response):
    body = repr({k: v for k, v in environ.items() if type(v) is str}).encode()
    start_response('200 OK', [('Content-Length', str(len(body)))])
    return [body]
'''


class TestCodec:
    """Packing and unpacking are each other's inverse, and nothing else passes."""

    def test_a_packet_written_out_by_hand(self):
        raw = b'\0\x0e\0\0' + b'\x03\0KEY' + b'\x01\0\xe9' + b'\x02\0A1' + b'\0\0'
        assert minuwsgi.pack_request({'KEY': '\xe9', 'A1': ''}) == raw
        assert minuwsgi.unpack_vars(raw[4:]) == [('KEY', '\xe9'), ('A1', '')]

    def test_every_proper_prefix_is_refused(self):
        raw = minuwsgi.pack_request({'KEY': 'value', 'OTHER': ''})[4:]
        ends = {len(block(b'KEY', b'value')), 0}
        for size in range(len(raw)):
            if size not in ends:
                with pytest.raises(minuwsgi.BadRequest):
                    minuwsgi.unpack_vars(raw[:size])

    def test_random_blocks_raise_nothing_else(self):
        import random
        chance = random.Random(4)
        for _ in range(3000):
            data = bytes(chance.choices(b'\0\1\2AB', k=chance.randrange(40)))
            with contextlib.suppress(minuwsgi.BadRequest):
                minuwsgi.unpack_vars(data)

    def test_expected_reads_like_the_plain_reader(self):
        """The guess from earlier packets never changes what a packet says."""
        import random
        chance = random.Random(5)
        names = [*minuwsgi.CONSTANT, 'REQUEST_METHOD', 'QUERY_STRING', 'CONTENT_LENGTH', 'REQUEST_URI', 'HTTP_A',
                 'HTTP_B', 'HTTP_COOKIE', 'HTTP_CONTENT_TYPE', 'PATH_INFO']
        values = ['', 'GET', '/', 'x' * 300, 'http', 'on', '\xff\0']
        row, expected = minuwsgi.Row(), minuwsgi.Expected({'base': 'x', 'SCRIPT_NAME': ''})
        common = [(name, values[i % 6]) for i, name in enumerate(names[:14])]
        for i in range(4000):
            items = list(common)
            for _ in range(chance.choice((0, 0, 0, 1, 2))):
                items[chance.randrange(len(items))] = chance.choice(names), chance.choice(values)
            if chance.random() < 0.2:
                chance.shuffle(items)
            expected.countdown = chance.choice((0, 5))
            data = frame(block(*(text.encode('latin-1') for item in items for text in item)))
            if chance.random() < 0.1:
                data = bytearray(data)
                data[chance.randrange(4, len(data))] = chance.randrange(256)
            row.memory[:len(data)] = bytes(data)
            plain = read_plainly(bytes(data))
            try:
                found = read_by_plan(expected, row.memory, len(data))
            except minuwsgi.BadRequest:
                found = None
            assert found == plain, (i, data)


def read_plainly(data):
    """(environ, how many variables) of a packet, by the plain reader; None for a bad one."""
    try:
        pairs = minuwsgi.unpack_vars(data[4:])
    except minuwsgi.BadRequest:
        return None
    environ = {'base': 'x', 'SCRIPT_NAME': ''}
    for name, value in pairs:
        if len(name) > 255:
            return None
        if name in environ and name.startswith('HTTP_'):
            value = environ[name] + ('; ' if name == 'HTTP_COOKIE' else ', ') + value
        environ[name] = value
    for name in minuwsgi.UNWANTED:
        environ.pop(name, None)
    minuwsgi.set_scheme(environ)
    return environ, len(pairs)


def read_by_plan(expected, memory, end):
    """As Core.serve() does it."""
    start, start_end, started, started_pieces, new, all_pieces, number = expected.plan
    text = memory[:end].decode('latin-1')
    simple = text[4:start_end] == start
    environ, pieces, at = (started(), started_pieces, start_end) if simple else (new(), all_pieces, 4)
    for raw, size, name in pieces:
        middle = at + size
        if text[at:middle] != raw:
            break
        at = middle + 2 + memory[middle] + (memory[middle + 1] << 8)
        environ[name] = text[middle + 2:at]
    else:
        raw = ''
    if raw or at != end:
        number = expected.rest(environ, memory, text, at, raw)
    return environ, number


BAD_PACKETS = {
    'an empty request': (frame(b''), 'an empty request'),
    'a size past the end': (frame(b'\x05\0AB'), 'do not add up'),
    'a name without a value': (frame(block(b'KEY')), 'do not add up'),
    'an empty name': (frame(block(b'', b'value')), 'without a name'),
    'a name of 300 bytes': (frame(block(b'x' * 300, b'v')), 'more than 255'),
    'one byte': (frame(b'x'), 'do not add up'),
    'modifier 5': (frame(block(b'A', b'B'), 5), 'modifier1 is 5'),
    'GET over HTTP': (b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', 'use uwsgi_pass, not proxy_pass'),
    'POST over HTTP': (b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc', 'use uwsgi_pass, not proxy_pass'),
    'OPTIONS over HTTP': (b'OPTIONS * HTTP/1.1\r\n\r\n', 'use uwsgi_pass, not proxy_pass'),
    'a negative length': (packet(CONTENT_LENGTH='-5'), "Content-Length '-5'"),
    'a length with a sign': (packet(CONTENT_LENGTH='+5') + b'abcde', "Content-Length '+5'"),
    'a length with a blank': (packet(CONTENT_LENGTH=' 5') + b'abcde', "Content-Length ' 5'"),
    'a length of 30 digits': (packet(CONTENT_LENGTH='9' * 30), 'Content-Length'),
    'chunked without a length': (packet(HTTP_TRANSFER_ENCODING='chunked'), 'uwsgi_request_buffering'),
}


class TestUwsgi:
    """A packet is read however it arrives; a bad one is answered in words."""

    @pytest.mark.parametrize('name', BAD_PACKETS)
    def test_a_bad_packet_gets_a_4xx_and_a_log_line_in_words(self, shared, name):
        data, words = BAD_PACKETS[name]
        server = shared(ENVIRON_APP)
        answer = Answer(exchange(server.socket, data))
        assert answer.status.startswith('4') and words in answer.text
        cause = answer.text.partition(': ')[2][:12]     # each is logged once a second
        wait_until(lambda: f'bad request: {cause}' in server.log, words)
        assert server.ask().status == '200 OK'

    def test_byte_by_byte(self, shared):
        data = packet('/some/path?query')
        with connect(shared(ENVIRON_APP).socket) as connection:
            for i in range(len(data)):
                connection.sendall(data[i:i + 1])
            assert eval(Answer(read_all(connection)).body)['PATH_INFO'] == '/some/path'

    def test_a_bad_packet_after_a_head_request_is_answered_in_words_too(self, shared):
        server = shared(ENVIRON_APP)
        assert server.ask(REQUEST_METHOD='HEAD').body == b''
        assert b'this is HTTP' in exchange(server.socket, b'GET / HTTP/1.1\r\n\r\n')

    def test_a_length_at_the_end_of_the_largest_packet_may_lie(self, shared):
        server = shared(ENVIRON_APP)
        filler = block(*(text for i in range(254) for text in (b'A%03d' % i, b'x' * 250)))
        data = frame(filler + b'\xff\0x')
        assert b'do not add up' in exchange(server.socket, data) and server.ask().status == '200 OK'

    def test_the_first_packet_may_be_a_bad_one(self, start):
        data, words = BAD_PACKETS['an empty name']
        server = start(ENVIRON_APP)
        assert words in Answer(exchange(server.socket, data)).text
        exchange(server.socket, minuwsgi.pack_request({'REQUEST_METHOD': 'GET', 'PATH_INFO': '/'}))     # another plan
        assert words in Answer(exchange(server.socket, data)).text

    def test_the_last_variable_may_tell_the_scheme(self, start):
        server = start(app=ENVIRON_APP)
        for scheme in 'http', 'https', 'http':          # the first packet is what the plan is made of
            assert eval(server.ask(UWSGI_SCHEME=scheme).body)['wsgi.url_scheme'] == scheme

    @pytest.mark.parametrize('size', [0, 1, 3, 4, 5, 100])
    def test_a_packet_that_ends_early_leaves_the_server_alone(self, shared, size):
        server = shared(ENVIRON_APP)
        with connect(server.socket) as connection:
            connection.sendall(packet()[:size])
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b''
        assert server.ask().status == '200 OK'

    def test_a_silent_client_is_given_up_after_the_timeout(self, start):
        server = start(ini='socket-timeout = 1')
        with connect(server.socket) as silent:
            silent.sendall(packet()[:50])
            assert read_all(silent) == b''
        server.wait_for('too slow')
        assert server.ask().body == b'hello\n'

    def test_a_client_that_dribbles_has_the_timeout_in_all(self, start):
        server = start(ini='socket-timeout = 1')
        with connect(server.socket) as slow, pytest.raises((BrokenPipeError, AssertionError)):
            slow.sendall(b'\0\xff\xff\0')
            wait_until(lambda: slow.send(b'x') == 0, 'the end')
        assert server.ask().body == b'hello\n'

    def test_a_ping_is_answered(self, shared):
        assert exchange(shared(ENVIRON_APP).socket, b'\x64\0\0\0') == b'\x64\0\0\1'

    def test_the_largest_packet(self, shared):
        value = 'x' * (65535 - 1000)
        answer = shared(ENVIRON_APP).ask(HTTP_COOKIE=value)
        assert eval(answer.body)['HTTP_COOKIE'] == value

    def test_modifier_30_takes_the_script_name_off(self, shared):
        data = bytearray(packet('/app/page', SCRIPT_NAME='/app'))
        data[0] = 30
        environ = eval(Answer(exchange(shared(ENVIRON_APP).socket, bytes(data))).body)
        assert (environ['SCRIPT_NAME'], environ['PATH_INFO']) == ('/app', '/page')

    def test_curl_asks_any_uwsgi_server(self, shared, tmp):
        code, output = run(tmp, '--curl', shared(ENVIRON_APP).socket, '/a%20b?c')
        assert code == 0 and output.startswith('HTTP/1.1 200 OK') and "'PATH_INFO': '/a b'" in output
        code, output = run(tmp, '--curl', tmp / 'nothing')
        assert code == 1 and 'nothing: No such file' in output


# ---------------------------------------------------------------------------------------------
# 5. HTTP/1.1

ECHO = '''
import json, os, time
FILE = open('big', 'wb')
FILE.write(bytes(range(256)) * 16384)
FILE.close()

def application(environ, start_response):
    """Answers with what it was asked; /x/... chooses a peculiar answer."""
    path, send = environ['PATH_INFO'], start_response
    if path == '/x/unread':
        send('200 OK', [('Content-Length', '2')])
        return [b'ok']
    if path == '/x/begun':
        send('200 OK', [])(b'ab')
    body = environ['wsgi.input'].read()
    if path == '/x/unknown-length':
        send('200 OK', [])
        return (part for part in (b'ab', b'', b'cde'))
    if path == '/x/write':
        write = send('200 OK', [])
        write(b'ab')
        return [b'cde']
    if path == '/x/list':
        send('200 OK', [])
        return [b'ab', b'cde']
    if path == '/x/empty':
        send('200 OK', [])
        return []
    if path in ('/x/204', '/x/304'):
        send(path[3:] + ' No body', [])
        return []
    if path in ('/x/204-generator', '/x/304-generator'):
        send(path[3:6] + ' No body', [])
        return (b'' for _ in range(2))
    if path == '/x/own':
        send('200 OK', [('Date', 'Thu, 01 Jan 1970 00:00:00 GMT'), ('Server', 'mine'), ('Content-Length', '2')])
        return [b'ok']
    if path == '/x/hop':
        send('200 OK', [(environ['QUERY_STRING'], 'x')])
        return [b'not reached']
    if path == '/x/big':
        send('200 OK', [])
        return environ['wsgi.file_wrapper'](open('big', 'rb'))
    if path == '/x/big-list':
        send('200 OK', [])
        return [b'x' * 4000000]
    if path == '/x/short':
        send('200 OK', [('Content-Length', '10')])
        return [b'ab']
    text = json.dumps({'body': body.decode('latin-1'), **{k: v for k, v in environ.items() if type(v) is str}}).encode()
    send('200 OK', [('Content-Type', 'application/json'), ('Content-Length', str(len(text)))])
    return [text]
'''


@contextlib.contextmanager
def running(app, ini, files=()):
    """A server with HTTP for many tests. files: [(name, bytes)]."""
    with tempfile.TemporaryDirectory(prefix='mu') as name:
        directory, port = pathlib.Path(name), free_port()
        for file, content in (('app.py', app.encode()), *files):
            (directory / file).parent.mkdir(exist_ok=True, parents=True)
            (directory / file).write_bytes(content)
        (directory / 'app.ini').write_text(
            f'[uwsgi]\nmodule = app:application\nsocket = s\nhttp-socket = 127.0.0.1:{port}\n' + textwrap.dedent(ini))
        server = Server(directory, ['app.ini']).ready()
        server.http = '127.0.0.1', port
        try:
            yield server
        finally:
            server.tracebacks_expected = server.log.count('Traceback') == server.log.count('\nValueError: ')
            server.end()


@pytest.fixture(scope='module')
def echo():
    with running(ECHO, 'limit-post = 100000\ndisable-logging = true\nsocket-timeout = 2') as server:
        yield server
        assert server.ask('/').status == '200 OK'       # nothing that it was asked has hurt it
        assert server.log.count(' died: ') == 0


def send_raw(server, data):
    """Send bytes and the end of our side; all that the server answers until it closes."""
    with connect(server.http) as connection:
        with contextlib.suppress(OSError):              # it has closed already
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def one_answer(raw, head_only=False):
    """(Answer, what comes behind it): a strict reader of one response."""
    head, end, rest = raw.partition(b'\r\n\r\n')
    assert end and not head.replace(b'\r\n', b'').translate(None, bytes(range(32, 127))), raw[:300]
    answer = Answer(head + b'\r\n\r\n')
    assert re.fullmatch(rb'HTTP/1\.1 [1-5]\d\d .+', head.split(b'\r\n')[0]), head
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", name) for name, _ in answer.headers), head
    names = [name.lower() for name, _ in answer.headers]
    assert len(set(names) & {'content-length', 'transfer-encoding'}) == len(
        [n for n in names if n in ('content-length', 'transfer-encoding')]) < 2, head
    if answer.status[0] == '1' or answer.status[:3] in ('204', '304') or head_only:
        pass
    elif answer.header('Transfer-Encoding') == 'chunked':
        body = b''
        while True:
            size, end, rest = rest.partition(b'\r\n')
            assert end and re.fullmatch(rb'[0-9a-f]+', size), rest[:100]
            chunk, rest = rest[:int(size, 16)], rest[int(size, 16):]
            assert rest[:2] == b'\r\n', rest[:100]
            body, rest = body + chunk, rest[2:]
            if not chunk:
                break
        answer.body = body
    elif answer.header('Content-Length') is not None:
        size = int(answer.header('Content-Length'))
        assert len(rest) >= size, raw[:300]
        answer.body, rest = rest[:size], rest[size:]
    else:
        assert answer.header('Connection') == 'close', head
        answer.body, rest = rest, b''
    return answer, rest


def answers(raw, head_only=False):
    """All responses in what came over a connection."""
    found = []
    while raw:
        answer, raw = one_answer(raw, head_only)
        found.append(answer)
    return found


class Kept:
    """A client that keeps its connection."""

    def __init__(self, server):
        self.connection, self.data = connect(server.http), b''

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def send(self, *lines, body=b''):
        self.connection.sendall('\r\n'.join([*lines, '', '']).encode('latin-1') + body)

    def answer(self, head_only=False):
        while True:
            end = self.data.find(b'\r\n\r\n') + 4
            length = re.search(rb'\r\nContent-Length: (\d+)', self.data[:end])
            if end > 3 and (head_only or not length or len(self.data) >= end + int(length[1])):
                answer, self.data = one_answer(self.data, head_only)
                return answer
            new = self.connection.recv(65536)
            assert new, f'closed after {self.data[:300]!r}'
            self.data += new

    def get(self, target='/', *headers):
        self.send(f'GET {target} HTTP/1.1', 'Host: x', *headers)
        return self.answer()

    def is_closed(self):
        return self.connection.recv(65536) == b''


FIRST_LINES = [                                 # with a Host: what becomes of it
    ('GET / HTTP/1.1', 200), ('GET /?a=b HTTP/1.1', 200), ('POST / HTTP/1.1', 200), ('BREW /pot HTTP/1.1', 200),
    ("!#$%&'*+-.^_`|~09azAZ / HTTP/1.1", 200), ('GET / HTTP/1.0', 200), ('OPTIONS * HTTP/1.1', 200),
    ('GET http://x/ HTTP/1.1', 200), ('GET HTTPS://x:80/a HTTP/1.1', 200), ('GET //x HTTP/1.1', 200),
    ('get / HTTP/1.1', 200), ('GET /' + 'a' * 16000 + ' HTTP/1.1', 200),
    ('GET  / HTTP/1.1', 400), ('GET /  HTTP/1.1', 400), (' GET / HTTP/1.1', 400), ('GET / HTTP/1.1 ', 400),
    ('GET\t/\tHTTP/1.1', 400), ('GET /\t HTTP/1.1', 400), ('GET / a HTTP/1.1', 400), ('GET /', 400), ('GET', 400),
    ('/ HTTP/1.1', 400), ('G(T / HTTP/1.1', 400), ('G\x80T / HTTP/1.1', 400), ('"GET" / HTTP/1.1', 400),
    ('GET /\x00 HTTP/1.1', 400), ('GET /\x07 HTTP/1.1', 400), ('GET /\x7f HTTP/1.1', 400), ('GET /\r HTTP/1.1', 400),
    ('GET /\n HTTP/1.1', 400), ('GET /#a HTTP/1.1', 400), ('GET /?a#b HTTP/1.1', 400), ('GET a HTTP/1.1', 400),
    ('GET * HTTP/1.1', 400), ('GET ftp://x/ HTTP/1.1', 400), ('GET http:/x HTTP/1.1', 400),
    ('GET http:///a HTTP/1.1', 400), ('GET http://a@b/ HTTP/1.1', 400), ('GET x:80 HTTP/1.1', 400),
    ('CONNECT x:80 HTTP/1.1', 501), ('GET / HTTP/2.0', 505), ('PRI * HTTP/2.0', 505), ('GET / HTTP/1.2', 505),
    ('GET / HTTP/0.9', 505), ('GET / HTTP/3.0', 505), ('GET / HTTP/1.10', 400), ('GET / HTTP/11', 400),
    ('GET / HTTP/1,1', 400), ('GET / http/1.1', 400), ('GET / HTTP/1.1x', 400), ('GET / HTTPS/1.1', 400),
    ('GET / HTTP/', 400), ('GET / FOO/1.1', 400), ('GET /' + 'a' * 17000 + ' HTTP/1.1', 414),
    ('GET /' + 'a' * 70000 + ' HTTP/1.1', 414),
]


@pytest.mark.parametrize('line, status', FIRST_LINES, ids=[repr(line)[:40] for line, _ in FIRST_LINES])
def test_first_line(echo, line, status):
    request = f'{line}\r\nHost: x\r\n\r\n'.encode('latin-1')
    found = answers(send_raw(echo, request))
    assert [int(answer.status[:3]) for answer in found] == [status]
    after = answers(send_raw(echo, b'GET / HTTP/1.1\r\nHost: x\r\n\r\n' + request))     # where the headers are known
    assert [int(answer.status[:3]) for answer in after] == [200, status]
    if status != 200:
        assert [answer.status for answer in answers(send_raw(echo, request + b'x' * 50))] == [found[0].status]
        assert found[0].header('Connection') == 'close' and found[0].header('Date')


HEADERS = [                                     # lines after GET / HTTP/1.1: what becomes of them
    ('Host: x', 200), ('host:x', 200), ('HOST:\t x \t', 200), ('Host: x:8000', 200), ('Host: [::1]:80', 200),
    ('Host:', 200), ('Host: x\r\nX-Empty:', 200), ('Host: x\r\nX: a\tb', 200), ('Host: x\r\nX: \xe4\xff', 200),
    ('Host: x\r\nX_A: 1', 200), ('Host: x\r\n' + 'X: 1\r\n' * 150 + 'Y: 1', 200), ('Host: x\r\nX: ' + 'a' * 60000, 200),
    ('Host: x\r\nX: a:b', 200), ('Host: x\r\nUpgrade: h2c', 200), ('Host: x\r\nContent-Length: 0', 200),
    ('X: 1', 400), ('Host: x\r\nHost: x', 400), ('Host: x\r\nhost: y', 400), ('Host: a b', 400), ('Host: a, b', 400),
    ('Host: x/y', 400), ('Host: a@b', 400), ('Host: \xe4', 400), ('Host: x?', 400),
    ('Host : x', 400), ('Host: x\r\nX : 1', 400), ('Host: x\r\nX\t: 1', 400), (' Host: x', 400),
    ('Host: x\r\n folded', 400), ('Host: x\r\nX: 1\r\n\tfolded', 400), ('Host: x\r\nX', 400), ('Host: x\r\n: 1', 400),
    ('Host: x\r\nX Y: 1', 400), ('Host: x\r\nX(: 1', 400), ('Host: x\r\nX\x00: 1', 400), ('Host: x\r\nX: \x00', 400),
    ('Host: x\r\nX: a\rb', 400), ('Host: x\r\nX: a\nb', 400), ('Host: x\nX: a', 400), ('Host: x\rX: a', 400),
    ('Host: x\r\nX: \x1b[0m', 400), ('Host: x\r\nX: \x7f', 400), ('Host: x\r\nX\xe4: 1', 400), ('Host: x\r\r\n', 400),
    ('Host: x\r\nContent-Type: a\r\nContent-Type: b', 400),
    ('Host: x\r\n' + 'X' * 255 + ': 1', 200), ('Host: x\r\n' + 'X' * 256 + ': 1', 400),
    ('Host: x\r\n' + 'X: 1\r\n' * 300 + 'Y: 1', 431), ('Host: x\r\nX: ' + 'a' * 70000, 431),
]


@pytest.mark.parametrize('lines, status', HEADERS, ids=[repr(lines)[:40] for lines, _ in HEADERS])
def test_headers(echo, lines, status):
    found = answers(send_raw(echo, f'GET / HTTP/1.1\r\n{lines}\r\n\r\n'.encode('latin-1')))
    assert [int(answer.status[:3]) for answer in found] == [status]


BODIES = [                                      # headers, body: the body that the application reads, or the status
    ('Content-Length: 3', b'abc', 'abc'), ('Content-Length: 0', b'', ''), ('Content-Length: 003', b'abc', 'abc'),
    ('Content-Length:3 ', b'abc', 'abc'), ('Content-Length: 100000', b'x' * 100000, 'x' * 100000),
    ('Content-Length: 100001', b'', 413), ('Content-Length: 99999999999999999', b'', 413),
    ('Content-Length: 3\r\nContent-Length: 3', b'abc', 400), ('Content-Length: 3\r\nContent-Length: 4', b'abc', 400),
    ('Content-Length: 3, 3', b'abc', 400), ('Content-Length: +3', b'abc', 400), ('Content-Length: -3', b'abc', 400),
    ('Content-Length: 3.0', b'abc', 400), ('Content-Length: 0x3', b'abc', 400), ('Content-Length: 3 4', b'abc', 400),
    ('Content-Length:', b'', 400), ('Content-Length: \xb2', b'ab', 400), ('Content-Length: 1e1', b'a', 400),
    ('Content-Length: 99999999999999999999999', b'', 400), ('Content-Length: 3;a=b', b'abc', 400),
    ('Content-Length: 3_0', b'abc', 400), ('Content-Length: "3"', b'abc', 400),
    ('Content-Length: 3\r\nTransfer-Encoding: chunked', b'0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked\r\nContent-Length: 3', b'0\r\n\r\n', 400),
    ('Transfer-Encoding: gzip', b'', 400), ('Transfer-Encoding: chunked, gzip', b'', 400),
    ('Transfer-Encoding: chunked, chunked', b'', 400), ('Transfer-Encoding: identity', b'', 400),
    ('Transfer-Encoding: xchunked', b'', 400), ('Transfer-Encoding: chunkedx', b'', 400),
    ('Transfer-Encoding: "chunked"', b'', 400), ('Transfer-Encoding:', b'', 400),
    ('Transfer-Encoding: ,chunked', b'', 400),
    ('Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked', b'', 400),
    ('Transfer-Encoding: \x0bchunked', b'', 400),
    ('Transfer-Encoding: chunked;q=1', b'', 400), ('Transfer-Encoding : chunked', b'', 400),
    ('Transfer-Encoding: gzip, chunked', b'', 501), ('Transfer_Encoding: chunked', b'', ''),
    ('Transfer-Encoding: chunked', b'3\r\nabc\r\n0\r\n\r\n', 'abc'),
    ('Transfer-Encoding: Chunked', b'3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n', 'abcde'),
    ('Transfer-Encoding: chunked', b'0\r\n\r\n', ''), ('Transfer-Encoding: chunked', b'000\r\n\r\n', ''),
    ('Transfer-Encoding: chunked', b'0a\r\n0123456789\r\n0\r\n\r\n', '0123456789'),
    ('Transfer-Encoding: chunked', b'A\r\n0123456789\r\n0\r\n\r\n', '0123456789'),
    ('Transfer-Encoding: chunked', b'3;a=b\r\nabc\r\n0;c\r\n\r\n', 'abc'),
    ('Transfer-Encoding: chunked', b'3 ;a\r\nabc\r\n0\r\n\r\n', 'abc'),
    ('Transfer-Encoding: chunked', b'3\r\n\r\n\r\r\n0\r\n\r\n', '\r\n\r'),
    ('Transfer-Encoding: chunked', b'1\r\na\r\n' * 2000 + b'0\r\n\r\n', 'a' * 2000),
    ('Transfer-Encoding: chunked', b'0\r\nX-Trailer: 1\r\nY: 2\r\n\r\n', ''),
    ('Transfer-Encoding: chunked', b'186a0\r\n' + b'x' * 100000 + b'\r\n0\r\n\r\n', 'x' * 100000),
    ('Transfer-Encoding: chunked', b'186a1\r\n', 413), ('Transfer-Encoding: chunked', b'c350\r\n' + b'x' * 50000
                                                        + b'\r\nc351\r\n', 413),
    ('Transfer-Encoding: chunked', b'3\r\nabcd\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'3\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'3\r\nabc\n0\r\n\r\n', 400), ('Transfer-Encoding: chunked', b'0\r\n\n', 400),
    ('Transfer-Encoding: chunked', b'-3\r\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'+3\r\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'0x3\r\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'g\r\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b' 3\r\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'3 \r\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'\r\nabc\r\n0\r\n\r\n', 400), ('Transfer-Encoding: chunked', b';a\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'3_0\r\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'1' * 16 + b'\r\n', 400),
    ('Transfer-Encoding: chunked', b'3;' + b'a' * 2000 + b'\r\n', 400),
    ('Transfer-Encoding: chunked', b'3;\ra\r\nabc\r\n0\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'3;\x00\r\nabc\r\n', 400),
    ('Transfer-Encoding: chunked', b'0\r\n folded\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'0\r\nX : 1\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'0\r\nnothing\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'0\r\nX: \x00\r\n\r\n', 400),
    ('Transfer-Encoding: chunked', b'0\r\n' + b'X: 1\r\n' * 300 + b'\r\n', 431),
]


@pytest.mark.parametrize('headers, body, wanted', BODIES, ids=[f'{h} {b!r}'[:60] for h, b, _ in BODIES])
def test_body(echo, headers, body, wanted):
    behind = b'GET /next HTTP/1.1\r\nHost: x\r\n\r\n'
    raw = send_raw(echo, f'POST / HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n'.encode('latin-1') + body + behind)
    found = answers(raw)
    if type(wanted) is int:
        assert [int(answer.status[:3]) for answer in found] == [wanted]             # and nothing for what came behind
    else:
        assert json.loads(found[0].body)['body'] == wanted
        assert [json.loads(answer.body)['PATH_INFO'] for answer in found] == ['/', '/next']


def test_a_bad_chunk_behind_a_begun_response_is_no_failure_of_the_application(echo):
    raw = send_raw(echo, b'POST /x/begun HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n')
    assert raw.endswith(b'\r\n\r\n2\r\nab\r\n') and 'POST /x/begun: the application failed' not in echo.log


def test_chunks_are_refused_in_http_1_0(echo):
    raw = send_raw(echo, b'POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n')
    assert answers(raw)[0].status == '400 Bad Request'


ENVIRON = [                                     # target, header lines: what is in the environ (None: not there)
    ('/a%20b%2Fc?d%20e=%41', '', dict(PATH_INFO='/a b/c', QUERY_STRING='d%20e=%41',
                                          REQUEST_URI='/a%20b%2Fc?d%20e=%41')),
    ('/%C3%A4', '', dict(PATH_INFO='/\xc3\xa4')), ('/\xe4', '', dict(PATH_INFO='/\xe4')),
    ('/%E4', '', dict(PATH_INFO='/\xe4')),
    ('/%', '', dict(PATH_INFO='/%')), ('/%4', '', dict(PATH_INFO='/%4')), ('/%zz', '', dict(PATH_INFO='/%zz')),
    ('/a+b', '', dict(PATH_INFO='/a+b')), ('/a/../b', '', dict(PATH_INFO='/a/../b')), ('/?', '', dict(QUERY_STRING='')),
    ('/a?b?c', '', dict(PATH_INFO='/a', QUERY_STRING='b?c')), ('//a', '', dict(PATH_INFO='//a')),
    ('http://other:81/p?q', '', dict(PATH_INFO='/p', QUERY_STRING='q', HTTP_HOST='other:81')),
    ('http://other', '', dict(PATH_INFO='/', HTTP_HOST='other')),
    ('/', '', dict(SCRIPT_NAME='', REQUEST_METHOD='GET', SERVER_PROTOCOL='HTTP/1.1', HTTP_HOST='x', CONTENT_LENGTH=None,
                   CONTENT_TYPE=None, REMOTE_ADDR='127.0.0.1', SERVER_NAME='127.0.0.1', **{'wsgi.url_scheme': 'http'})),
    ('/', 'User-Agent: me', dict(HTTP_USER_AGENT='me')), ('/', 'uSER-aGENT:me', dict(HTTP_USER_AGENT='me')),
    ('/', 'X: \t a b \t ', dict(HTTP_X='a b')), ('/', 'X: \xe4', dict(HTTP_X='\xe4')), ('/', 'X:', dict(HTTP_X='')),
    ('/', 'X: 1\r\nX: 2\r\nx: 3', dict(HTTP_X='1, 2, 3')),
    ('/', 'Cookie: a=1\r\nCookie: b=2', dict(HTTP_COOKIE='a=1; b=2')),
    ('/', 'X_A: bad\r\nX-A: good', dict(HTTP_X_A='good')), ('/', 'X-A: good\r\nX_A: bad', dict(HTTP_X_A='good')),
    ('/', 'X_A: bad', dict(HTTP_X_A=None)), ('/', 'Proxy: http://evil', dict(HTTP_PROXY=None)),
    ('/', 'Content_Length: 3', dict(CONTENT_LENGTH=None)),
    ('/', 'Content-Type: a/b', dict(CONTENT_TYPE='a/b', HTTP_CONTENT_TYPE=None)),
    ('/', 'X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https',
     {'REMOTE_ADDR': '127.0.0.1', 'HTTP_X_FORWARDED_FOR': '1.2.3.4', 'wsgi.url_scheme': 'http'}),
    ('/', 'SCRIPT_NAME: /x\r\nwsgi.input: 1', {'SCRIPT_NAME': '', 'HTTP_WSGI.INPUT': '1'}),
]


@pytest.mark.parametrize('target, lines, wanted', ENVIRON, ids=[f'{t} {h}'[:60] for t, h, _ in ENVIRON])
def test_environ(echo, target, lines, wanted):
    head = f'GET {target} HTTP/1.1\r\nHost: x\r\n{lines}'.rstrip('\r\n') + '\r\n\r\n'
    first, second = answers(send_raw(echo, 2 * head.encode('latin-1')))
    found = json.loads(first.body)
    assert {name: found.get(name) for name in wanted} == wanted
    assert json.loads(second.body) == found             # read in another way, when it is the same again


KEPT = [('HTTP/1.1', None, True), ('HTTP/1.1', 'close', False), ('HTTP/1.1', 'Close', False),
        ('HTTP/1.1', 'x, close', False),
        ('HTTP/1.1', 'keep-alive', True), ('HTTP/1.1', 'not-close', True), ('HTTP/1.1', 'TE,\tclose', False),
        ('HTTP/1.0', None, False), ('HTTP/1.0', 'keep-alive', True), ('HTTP/1.0', 'Keep-Alive', True),
        ('HTTP/1.0', 'keep-alive, close', False), ('HTTP/1.0', 'x-keep-alive', False)]


@pytest.mark.parametrize('protocol, wish, kept', KEPT)
def test_connection_is_kept(echo, protocol, wish, kept):
    head = f'GET /a {protocol}\r\nHost: x\r\n' + (f'Connection: {wish}\r\n' if wish else '') + '\r\n'
    found = answers(send_raw(echo, head.encode() * 3))
    assert len(found) == (3 if kept else 1)
    says = found[0].header('Connection')
    assert says == ('close' if not kept else 'keep-alive' if protocol == 'HTTP/1.0' else None)


RESPONSES = [                                   # path, protocol: (status, headers that are there, body)
    ('/x/unknown-length', 'HTTP/1.1', '200', {'Transfer-Encoding': 'chunked', 'Connection': None}, b'abcde'),
    ('/x/unknown-length', 'HTTP/1.0', '200', {'Transfer-Encoding': None, 'Connection': 'close'}, b'abcde'),
    ('/x/write', 'HTTP/1.1', '200', {'Transfer-Encoding': 'chunked'}, b'abcde'),
    ('/x/write', 'HTTP/1.0', '200', {'Transfer-Encoding': None, 'Connection': 'close'}, b'abcde'),
    ('/x/list', 'HTTP/1.1', '200', {'Content-Length': '5', 'Connection': None}, b'abcde'),
    ('/x/list', 'HTTP/1.0', '200', {'Content-Length': '5', 'Connection': 'close'}, b'abcde'),
    ('/x/empty', 'HTTP/1.1', '200', {'Content-Length': '0'}, b''),
    ('/x/204', 'HTTP/1.1', '204', {'Content-Length': None, 'Transfer-Encoding': None, 'Connection': None}, b''),
    ('/x/304', 'HTTP/1.1', '304', {'Content-Length': None, 'Transfer-Encoding': None, 'Connection': None}, b''),
    ('/x/204-generator', 'HTTP/1.1', '204', {'Content-Length': None, 'Transfer-Encoding': None}, b''),
    ('/x/304-generator', 'HTTP/1.1', '304', {'Content-Length': None, 'Transfer-Encoding': None}, b''),
    ('/x/own', 'HTTP/1.1', '200', {'Date': 'Thu, 01 Jan 1970 00:00:00 GMT', 'Server': 'mine'}, b'ok'),
    ('/x/big', 'HTTP/1.1', '200', {'Content-Length': '4194304'}, bytes(range(256)) * 16384),
    ('/x/big-list', 'HTTP/1.1', '200', {'Content-Length': '4000000'}, b'x' * 4000000),
]


@pytest.mark.parametrize('path, protocol, status, headers, body', RESPONSES, ids=[f'{r[0]} {r[1]}' for r in RESPONSES])
def test_response(echo, path, protocol, status, headers, body):
    found = answers(send_raw(echo, f'GET {path} {protocol}\r\nHost: x\r\n\r\n'.encode() * 2))
    assert len(found) == (2 if protocol == 'HTTP/1.1' else 1)
    for answer in found:
        assert (answer.status[:3], answer.body) == (status, body)
        assert {name: answer.header(name) for name in headers} == headers
        names = [name for name, _ in answer.headers]
        assert names.count('Date') == names.count('Server') == 1
    head, *more = answers(send_raw(echo, f'HEAD {path} {protocol}\r\nHost: x\r\n\r\n'.encode()), head_only=True)
    assert (head.status[:3], more) == (status, [])


@pytest.mark.parametrize('name', ['Connection', 'keep-alive', 'Transfer-Encoding', 'Upgrade', 'Trailer', 'TE'])
def test_hop_by_hop_headers_of_the_application_are_left_out(echo, name):
    answer, again = answers(send_raw(echo, f'GET /x/hop?{name} HTTP/1.1\r\nHost: x\r\n\r\n'.encode() * 2))
    assert answer.status == again.status == '200 OK' and answer.header(name) is None


def test_connection_close_of_the_application_closes_it(start):
    server = start(HELLO.replace("[(", "[('Connection', 'close'), ("), http=True)
    answer, = answers(send_raw(server, b'GET / HTTP/1.1\r\nHost: x\r\n\r\n' * 2))
    assert answer.body == b'hello\n' and answer.header('Connection') == 'close'


def test_a_short_response_is_cut(echo):
    assert send_raw(echo, b'GET /x/short HTTP/1.1\r\nHost: x\r\n\r\n' * 2).count(b'HTTP/1.1') <= 1


def test_date_is_now(echo):
    from email.utils import parsedate_to_datetime
    seen = set()
    with Kept(echo) as kept:
        while len(seen) < 3:                            # two seconds end meanwhile
            before = int(time.time())
            said = parsedate_to_datetime(kept.get().header('Date')).timestamp()
            assert before <= said <= time.time()
            seen.add(said)
    assert echo.get('/').header('Server') == 'minuwsgi'


def test_empty_lines_before_a_request_are_skipped(echo):
    raw = b'\r\n\r\nPOST /1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n'
    assert [json.loads(answer.body)['PATH_INFO'] for answer in answers(send_raw(echo, raw))] == ['/1', '/2']


def test_pipelined_requests_are_answered_in_order(echo):
    requests = [b'GET /%d HTTP/1.1\r\nHost: x\r\n\r\n' % i if i % 3 else
                b'POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nGET /' % i if i % 2 else
                b'POST /%d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nGET /\r\n0\r\n\r\n' % i
                for i in range(500)]
    found = answers(send_raw(echo, b''.join(requests)))
    assert [json.loads(answer.body)['PATH_INFO'] for answer in found] == [f'/{i}' for i in range(500)]


def test_requests_may_come_in_any_pieces(echo):
    request = b'POST /1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n' \
        b'GET /2 HTTP/1.1\r\nHost: x\r\n\r\n'
    for at in range(1, len(request)):
        with Kept(echo) as client:
            client.connection.sendall(request[:at])
            client.connection.sendall(request[at:])
            assert [json.loads(client.answer().body)['PATH_INFO'] for _ in range(2)] == ['/1', '/2']


@pytest.mark.parametrize('path', ['/x/big', '/x/big-list'])
def test_a_request_behind_an_offloaded_response_is_answered(echo, path):
    with Kept(echo) as client:                          # it doesn't read, so the response is offloaded
        client.send(f'GET {path} HTTP/1.1', 'Host: x', '', 'GET /next HTTP/1.1', 'Host: x')
        assert echo.get('/meanwhile').status == '200 OK'
        assert len(client.answer().body) >= 4000000
        assert json.loads(client.answer().body)['PATH_INFO'] == '/next'
        assert json.loads(client.get('/more').body)['PATH_INFO'] == '/more'


def test_100_continue_is_sent_when_the_application_reads(echo):
    with Kept(echo) as client:
        client.send('POST / HTTP/1.1', 'Host: x', 'Content-Length: 3', 'Expect: 100-Continue')
        assert client.answer().status == '100 Continue'
        client.connection.sendall(b'abc')
        assert json.loads(client.answer().body)['body'] == 'abc'
        assert client.get('/').status == '200 OK'


def test_100_continue_is_not_sent_when_the_application_does_not_read(echo):
    with Kept(echo) as client:
        client.send('POST /x/unread HTTP/1.1', 'Host: x', 'Content-Length: 3', 'Expect: 100-continue')
        answer = client.answer()
        assert (answer.status, answer.body, answer.header('Connection')) == ('200 OK', b'ok', 'close')


@pytest.mark.parametrize('protocol, begun', [('HTTP/1.0', b''), ('HTTP/1.1', b'a'), ('HTTP/1.1', b'abc')])
def test_100_continue_is_not_sent_without_need(echo, protocol, begun):
    with Kept(echo) as client:
        client.send(f'POST / {protocol}', 'Host: x', 'Content-Length: 3', 'Expect: 100-continue', body=begun)
        if len(begun) < 3:
            assert not select.select([client.connection], [], [], 0.2)[0]
        client.connection.sendall(b'abc'[len(begun):])
        assert json.loads(client.answer().body)['body'] == 'abc'


def test_a_request_waits_until_the_client_has_read_the_response_before(start, tmp):
    server = start(APPS, 'http-socket = h\nsocket-timeout = 1')
    server.http = str(tmp / 'h')
    (tmp / 'f').write_bytes(b'x' * 180000)              # it nearly fills the buffer of the socket
    with Kept(server) as client:
        client.send('GET /file HTTP/1.1', 'Host: x', f'File: {tmp / "f"}', '', 'GET /hello HTTP/1.1', 'Host: x')
        select.select([], [], [], 2.5)
        assert len(client.answer().body) == 180000 and client.answer().body == b'hello\n'


def test_a_client_may_pipeline_more_than_it_reads(echo):
    with Kept(echo) as client:
        requests = b''.join(b'GET /%d HTTP/1.1\r\nHost: x\r\n\r\n' % i for i in range(20000))
        sender = threading.Thread(target=client.connection.sendall, args=(requests,))
        sender.start()
        assert echo.get('/meanwhile').status == '200 OK'
        for i in range(20000):
            assert json.loads(client.answer().body)['PATH_INFO'] == f'/{i}'
        sender.join(PATIENCE)


def test_empty_lines_before_a_request_may_come_in_pieces(echo):
    with Kept(echo) as client:
        for piece in (b'\r', b'\n\r', b'\nGET /after HTTP/1.1\r\nHost: x\r\n\r\n'):
            client.connection.sendall(piece)
            assert echo.get('/meanwhile').status == '200 OK'        # so it has read the piece
        assert json.loads(client.answer().body)['PATH_INFO'] == '/after'


def test_an_empty_line_after_a_body_is_no_request(echo):
    """Neither at once nor a moment later: no 408 for what isn't one, and the connection is kept."""
    with Kept(echo) as one, Kept(echo) as other:
        for client, end in (one, b'\r\n'), (other, b''):
            client.send('POST / HTTP/1.1', 'Host: x', 'Content-Length: 3', body=b'abc' + end)
            assert client.answer().status == '200 OK'
        other.connection.sendall(b'\r\n')
        assert select.select([one.connection, other.connection], [], [], 3.2)[0] == []      # socket-timeout is 2
        assert one.get('/').status == other.get('/').status == '200 OK'


def test_an_unread_body_is_not_taken_for_a_request(echo):
    smuggled = b'GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n'
    head = b'POST /x/unread HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n'
    assert [a.body for a in answers(send_raw(echo, head % len(smuggled) + smuggled))] == [b'ok']
    large = b'x' * 60000 + smuggled
    answer, = answers(send_raw(echo, head % len(large) + large))
    assert answer.body == b'ok'
    chunks = head.replace(b'Content-Length: %d', b'Transfer-Encoding: chunked') + b'%x\r\n' % len(large) + large
    answer, = answers(send_raw(echo, chunks + b'\r\n0\r\n\r\n'))
    assert (answer.body, answer.header('Connection')) == (b'ok', 'close')


def test_the_same_headers_with_another_first_line_are_read_anew(echo):
    with Kept(echo) as client:
        assert json.loads(client.get('/a?b', 'X: 1').body)['QUERY_STRING'] == 'b'
        found = json.loads(client.get('/c', 'X: 1').body)
        assert (found['PATH_INFO'], found['QUERY_STRING'], found['HTTP_X']) == ('/c', '', '1')
        assert json.loads(client.get('/%41', 'X: 1').body)['PATH_INFO'] == '/A'
        assert 'HTTP_X' not in json.loads(client.get('/c').body)
        client.send('HEAD /c HTTP/1.1', 'Host: x')
        assert client.answer(head_only=True).status == '200 OK' and client.data == b''
        client.send('GET /c#d HTTP/1.1', 'Host: x')
        assert client.answer().status == '400 Bad Request' and client.is_closed()


NOT_HTTP = [(b'\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03' + bytes(200), 'TLS'), (packet('/'), 'uwsgi packet'),
            (bytes(100), 'uwsgi packet'), (b'GET / HTTP/1.1\nHost: x\n\n', 'without CR'), (b'\xff\xfe', 'not HTTP'),
            (b'GET / HTTP/1.1\r\nHost: x\n', 'without CR'), (b'GET /' + b'a' * 20000, 'the first line is too long'),
            (b'POST /' + b'a' * 20000 + b' HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n\nx',
             'the first line is too long'),
            (b'GET / HTTP/1.1\r\n' + b'X: 1\r\n' * 12000, 'the head is too long')]


@pytest.mark.parametrize('data, words', NOT_HTTP, ids=[words for _, words in NOT_HTTP])
def test_what_is_not_http_is_answered_in_words(echo, data, words):
    with connect(echo.http) as connection:
        connection.sendall(data)
        answer, = answers(read_all(connection))
    assert answer.status[:3] in ('400', '414', '431') and words in answer.text


def test_a_head_without_its_end_is_not_taken_for_an_earlier_one(echo):
    for request, status in (b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', 200), (b'GET / HTTP/1.1\r\nHost: x\n', 400):
        with connect(echo.http) as connection:
            connection.sendall(request)
            assert Answer(connection.recv(65536)).status[:3] == str(status)


def test_connections_with_the_same_headers_see_the_same_of_them(echo):
    request = b'GET / HTTP/1.1\r\nHost: x\r\nContent-Type: text/x\r\nX-Also: a\r\n\r\n'
    for _ in range(3):
        with connect(echo.http) as connection:
            connection.sendall(request)
            found = json.loads(Answer(connection.recv(65536)).body)
            assert found['CONTENT_TYPE'] == 'text/x' and found['HTTP_X_ALSO'] == 'a'


def test_connections_with_the_same_headers_keep_their_own_addresses(echo):
    request = b'GET /%d HTTP/1.1\r\nHost: x\r\nX-Same: yes\r\nConnection: close\r\n\r\n'
    for i in range(3):
        with connect(echo.http) as connection:
            connection.sendall(request % i)
            found = json.loads(Answer(read_all(connection)).body)
            assert found['REMOTE_PORT'] == str(connection.getsockname()[1]) and found['PATH_INFO'] == f'/{i}'
            assert found['HTTP_X_SAME'] == 'yes'


def test_a_client_that_leaves_does_no_harm(echo):
    for data in (b'GET', b'GET / HTTP/1.1\r\nHost: x\r\n\r\n',
                 b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab',
                 b'GET /x/big HTTP/1.1\r\nHost: x\r\n\r\n', b'GET /x/big-list HTTP/1.1\r\nHost: x\r\n\r\n' * 3,
                 b'GET /x/unknown-length HTTP/1.1\r\nHost: x\r\n\r\n' * 300,
                 b'POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab'):
        for hard in (False, True):
            connection = connect(echo.http)
            if hard:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
            connection.sendall(data)
            connection.close()
    assert echo.get('/').status == '200 OK'
    assert echo.log.count('Traceback') == echo.log.count('\nValueError: ')


def test_silent_and_slow_clients_hold_nobody(start):
    server = start(HELLO, 'processes = 1\ndisable-logging = true', http=True)
    silent = [connect(server.http) for _ in range(100)]
    slow = [connect(server.http) for _ in range(50)]
    head, slowest = b'GET / HTTP/1.1\r\nHost: x\r\n', 0
    with Kept(server) as client:
        for i in range(10):
            for connection in slow:
                connection.sendall(head[i:i + 1])
            began = time.monotonic()
            assert client.get().body == server.get().body == b'hello\n'
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < 1
    for connection in slow:
        connection.sendall(head[10:] + b'\r\n')
        assert connection.recv(4096).startswith(b'HTTP/1.1 200')
    for connection in silent + slow:
        connection.close()


def test_silent_clients_make_room_when_descriptors_run_out(start):
    import resource
    server = start(HELLO, 'processes = 1', http=True,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    silent = [connect(server.http) for _ in range(100)]
    assert server.get().body == b'hello\n'
    server.wait_for('accept: Too many open files')
    for connection in silent:
        connection.close()


def test_a_new_client_is_served_before_a_later_request_of_one_that_is_kept(start):
    """Another worker may be free for the new one: nobody else can serve the kept one."""
    server = start('''
        import itertools
        count = itertools.count()
        def application(e, s):
            s('200 OK', [])
            return [str(next(count)).encode()]
        ''', http=True)
    with Kept(server) as kept:
        assert kept.get().text == '0'
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        with Kept(server) as new:
            new.send('GET / HTTP/1.1', 'Host: x')
            kept.send('GET / HTTP/1.1', 'Host: x')
            os.kill(worker, signal.SIGCONT)
            assert (new.answer().text, kept.answer().text) == ('1', '2')


def test_what_is_pipelined_behind_the_last_request_does_not_reset_the_connection(echo):
    last = b'GET /x/big-list HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'
    with connect(echo.http) as connection:
        connection.sendall(last + b'GET / HTTP/1.1\r\nHost: x\r\n\r\n' * 10000)
        answer, = answers(read_all(connection))
    assert len(answer.body) == 4000000


def test_a_head_has_its_time_in_all_and_idle_connections_theirs(start):
    server = start(HELLO, 'socket-timeout = 1\nhttp-timeout = 3', http=True)
    with connect(server.http) as slow, connect(server.http) as silent, Kept(server) as kept, Kept(server) as second:
        date = kept.get().header('Date')
        second.connection.sendall(b'GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n')    # one and a half
        began = time.monotonic()
        while not select.select([slow], [], [], 0.1)[0]:
            slow.sendall(b'G')
            assert time.monotonic() - began < PATIENCE
        assert answers(read_all(slow))[0].status == '408 Request Timeout'
        assert 1 <= time.monotonic() - began < 4
        assert [a.status[:3] for a in answers(read_all(second.connection))] == ['200', '408']
        assert not select.select([silent, kept.connection], [], [], 0)[0]
        assert read_all(silent) == b'' and kept.is_closed()
        assert 3 <= time.monotonic() - began < 8
    assert server.get().header('Date') != date


def test_a_connection_that_comes_back_from_an_offload_thread_has_its_time_too(start):
    server = start("""
        def application(environ, start_response):
            body = b'x' * int(environ['QUERY_STRING'])
            start_response('200 OK', [('Content-Length', str(len(body)))])
            return [body]
        """, 'http-timeout = 1', http=True)
    with Kept(server) as kept:
        kept.send('GET /?10000000 HTTP/1.1', 'Host: x')
        assert server.get('/?1').body == b'x'           # so the worker has handed the other response on
        assert len(kept.answer().body) == 10_000_000
        assert kept.is_closed()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_kept_connections_are_answered_and_closed_at_a_stop_or_reload(start, number):
    server = start(HELLO, '', http=True)
    with Kept(server) as busy, Kept(server) as idle, Kept(server) as half:
        busy.get(), idle.get(), half.get()
        half.connection.sendall(b'GET / HTTP/1.1\r\n')
        busy.get()                                              # the server has read that
        server.kill(number)
        while (answer := busy.get()).header('Connection') != 'close':
            assert answer.body == b'hello\n'
        assert answer.body == b'hello\n' and busy.is_closed() and idle.is_closed()
        half.send('Host: x')
        answer = half.answer()
        assert (answer.body, answer.header('Connection')) == (b'hello\n', 'close')
    if number == signal.SIGHUP:
        assert server.get().body == b'hello\n'
        assert server.stop() == 0
    assert server.wait() == 0


def test_threads_close_no_kept_connection_at_a_stop_that_has_sent_a_request(start):
    server, chance = start(HELLO, 'threads = 4\ndisable-logging = true', http=True), random.Random(1)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Kept(server)) for _ in range(300)]
        for client in clients:
            client.get()
        server.kill(signal.SIGTERM)
        began, sent, answered = time.monotonic(), [], 0
        for when, client in zip(sorted(chance.uniform(0.95, 1.1) for _ in clients), clients):      # it closes after 1 s
            if not select.select([client.connection], [], [], max(0, began + when - time.monotonic()))[0]:
                client.send('GET / HTTP/1.1', 'Host: x')
                sent.append(client)
        for client in sent:
            with contextlib.suppress(ConnectionError):
                answered += not client.is_closed()
    assert sent and answered >= len(sent) - 2           # they may cross on their way


def test_what_is_pipelined_behind_a_job_is_answered_at_a_stop(start):
    server = start(HOSTILE, http=True)
    with Kept(server) as client:
        client.send('GET /big HTTP/1.1', 'Host: x', '', 'GET / HTTP/1.1', 'Host: x')
        client.connection.recv(1, socket.MSG_PEEK)
        server.kill(signal.SIGTERM)
        server.wait_for('stopping')
        select.select([], [], [], 0.3)
        assert len(client.answer().body) == 10000000
        answer = client.answer()
        assert (answer.body, answer.header('Connection')) == (b'hello\n', 'close')
    assert server.wait() == 0


def test_threads_share_kept_connections(start):
    server = start(ECHO, 'threads = 4\ndisable-logging = true', http=True)
    right = []

    def ask_often(number):
        with Kept(server) as client:
            for i in range(100):
                path = f'/{number}/{i}'
                client.send(f'GET {path} HTTP/1.1', 'Host: x', '', f'GET {path}/b HTTP/1.1', 'Host: x')
                found = [json.loads(client.answer().body)['PATH_INFO'] for _ in range(2)]
                if found == [path, path + '/b'] and (i % 10 or server.ask(path).status == '200 OK'):
                    right.append(path)
    threads = [threading.Thread(target=ask_often, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(right) == 1000


@pytest.mark.parametrize('header, address, scheme', [
    ('X-Forwarded-For: 1.2.3.4', '1.2.3.4', 'http'), ('X-Forwarded-For: 6.6.6.6, 1.2.3.4', '1.2.3.4', 'http'),
    ('X-Forwarded-For: 6.6.6.6, 1.2.3.4, 10.1.2.3', '1.2.3.4', 'http'),
    ('X-Forwarded-For: 10.1.1.1', '10.1.1.1', 'http'), ('X-Forwarded-For: 1.2.3.4:5678', '1.2.3.4', 'http'),
    ('X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: 10.0.0.1', '1.2.3.4', 'http'),
    ('X-Forwarded-For: 2001:db8::1', '2001:db8::1', 'http'),
    ('X-Forwarded-For: junk', '127.0.0.1', 'http'), ('X-Forwarded-For: junk, 10.0.0.1', '10.0.0.1', 'http'),
    ('X-Forwarded-Proto: https', '127.0.0.1', 'https'), ('X-Forwarded-Proto: HTTPS', '127.0.0.1', 'https'),
    ('X-Forwarded-Proto: ftp', '127.0.0.1', 'http'), ('X-Forwarded-Proto: https, http', '127.0.0.1', 'http')])
def test_a_trusted_proxy_is_believed(behind_proxy, header, address, scheme):
    raw = f'GET / HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n'.encode()
    for answer in answers(send_raw(behind_proxy, raw + raw)):
        found = json.loads(answer.body)
        assert (found['REMOTE_ADDR'], found['wsgi.url_scheme']) == (address, scheme)


def test_who_is_no_trusted_proxy_is_not_believed(start):
    server = start(ECHO, 'trust-proxy = 10.0.0.0/8', http=True)
    found = json.loads(server.get(headers='X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n').body)
    assert (found['REMOTE_ADDR'], found['wsgi.url_scheme']) == ('127.0.0.1', 'http')


def test_a_trusted_proxy_is_known_by_its_ipv4_address_on_an_ipv6_socket_too(start):
    port = free_port()
    server = start(ECHO, f'trust-proxy = 127.0.0.1\nhttp-socket = [::]:{port}')
    server.http = '127.0.0.1', port
    assert json.loads(server.get(headers='X-Forwarded-For: 1.2.3.4\r\n').body)['REMOTE_ADDR'] == '1.2.3.4'


def test_with_trust_proxy_whoever_may_use_our_unix_socket_is_believed(start):
    server = start(ECHO, 'trust-proxy = 10.0.0.1\nhttp-socket = s')
    server.http = server.socket
    found = json.loads(server.get(headers='X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n').body)
    assert (found['REMOTE_ADDR'], found['wsgi.url_scheme']) == ('1.2.3.4', 'https')


@pytest.fixture(scope='module')
def behind_proxy():
    with running(ECHO, 'trust-proxy = 127.0.0.1\ntrust-proxy = 10.0.0.0/8') as server:
        yield server


def fuzz(seeds, make, talk, judge):
    """For each seed: make(chance) gives the input, talk(input) what the server answers, judge(input, answer) a name
    for it, or an AssertionError. ({name: how many}, [failure])"""
    kinds, failures = collections.Counter(), []
    for seed in seeds:
        case = make(random.Random(seed))
        raw = talk(case)
        try:
            kinds[judge(case, raw)] += 1
        except AssertionError as error:
            failures.append(f'seed {seed}: {repr(case)[:600]} got {raw[:300]!r}: {error}')
    return kinds, failures


HTTP_SEEDS = [
    b'GET /a?b=c HTTP/1.1\r\nHost: x\r\nX-Y: z\r\nCookie: a=b\r\n\r\n',
    b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\nContent-Type: text/plain\r\n\r\nhello world',
    b'POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n'
    b'5;a=b\r\nhello\r\n6\r\n world\r\n0\r\nT: 1\r\n\r\n',
    b'HEAD http://x/ HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n']
HTTP_PIECES = [
    b'\r\n', b'\n', b'\r', b'\0', b' ', b'\t', b':', b';', b',', b'0', b'ffffffff', b'-1', b'\xff', b'HTTP/1.1', b'%00',
    b'chunked', b'Content-Length: 3\r\n', b'Transfer-Encoding: chunked\r\n', b'Host: y\r\n',
    b'Expect: 100-continue\r\n', b'\r\n\r\n', b'/../', b'a' * 5000]


def http_mutation(chance):
    data = bytearray(b''.join(chance.choices(HTTP_SEEDS, k=chance.randint(1, 3))))
    for _ in range(chance.randint(1, 6)):
        at, size = chance.randrange(len(data) + 1), chance.choice((0, 0, 1, 2, 8, 40))
        new = chance.choice((chance.choice(HTTP_PIECES), bytes([chance.randrange(256)]), data[at:at + 30] * 2))
        data[at:at + size] = new
    return bytes(data)


def judge_http(data, raw):
    if b'HEAD' in data:
        assert not raw or raw.startswith(b'HTTP/1.1 ')
        return raw[9:12]
    return b' '.join(answer.status[:3].encode() for answer in answers(raw)[:1])


def test_fuzzing_gets_well_formed_answers_only(echo):
    """MINUWSGI_FUZZ=20000 for more. A failure names the seed of its input."""
    seeds = range(int(os.environ.get('MINUWSGI_FUZZ', 1000)))
    _, failures = fuzz(seeds, http_mutation, lambda data: send_raw(echo, data), judge_http)
    assert failures == []
    assert len({line[:25] for line in echo.lines if line.startswith('bad request')}) < 40      # causes are few
    assert echo.get('/').status == '200 OK'
    assert echo.log.count('the application failed') == echo.log.count('\nValueError: ')


def test_h11_reads_all_that_we_send(echo):
    h11 = pytest.importorskip('h11')
    for path, protocol, *_ in RESPONSES + [('/', 'HTTP/1.1'), ('/x/hop?TE', 'HTTP/1.1'), ('/#', 'HTTP/1.1')]:
        for method in 'GET', 'HEAD':
            reader = h11.Connection(h11.CLIENT)
            reader.send(h11.Request(method=method, target='/', headers=[('Host', 'x')]))
            reader.send(h11.EndOfMessage())
            reader.receive_data(send_raw(echo, f'{method} {path} {protocol}\r\nHost: x\r\n\r\n'.encode()))
            reader.receive_data(b'')
            events = []
            while type(event := reader.next_event()) not in (h11.EndOfMessage, h11.ConnectionClosed):
                assert event is not h11.NEED_DATA, path
                events.append(event)
            assert type(events[0]) is h11.Response and not reader.trailing_data[0], path


# ---------------------------------------------------------------------------------------------
# 6. WSGI

APPS = '''
import enum, io, os, sys, threading
def application(environ, start_response):
    return globals()[environ['PATH_INFO'].strip('/')](environ, start_response)

def head(*headers, status='200 OK', start):
    return start(status, list(headers))

def hello(e, s):
    s('200 OK', [('Content-Length', '6')]); return [b'hello\\n']
def no_length(e, s):
    s('200 OK', []); return [b'hello\\n']
def chunks(e, s):
    s('200 OK', []); return (b'a', b'', b'b', b'c')
def generator(e, s):
    s('200 OK', []); yield b'a'; yield b''; yield b'b'
def same_length(e, s):
    s('200 OK', [('Content-Length', '1'), ('Set-Cookie', 'session=alice')]); return [b'a']
def late_start(e, s):
    s('200 OK', []); yield b'x'
def only_bytes(e, s):
    s('200 OK', []); return b'whole'
def write(e, s):
    w = s('200 OK', []); w(b'a'); w(b'b'); return [b'c']
def empty(e, s):
    s('200 OK', [('X-Empty', 'yes')]); return []
def environ(e, s):
    body = repr({k: repr(v) if type(v) is not str else v for k, v in e.items()}).encode()
    s('200 OK', []); return [body]
def read(e, s):
    i = e['wsgi.input']
    out = eval(e['QUERY_STRING'], {'i': i}); s('200 OK', []); return [repr(out).encode()]
def unread(e, s):
    s('401 Unauthorized', [('Content-Length', '2')]); return [b'no']
def errors(e, s):
    e['wsgi.errors'].write('written to wsgi.errors'); e['wsgi.errors'].write(chr(10)); return hello(e, s)

def fail_early(e, s):
    raise RuntimeError('fails before the head')
def fail_after_start(e, s):
    s('200 OK', []); raise RuntimeError('fails after the head was given')
def fail_first(e, s):
    s('200 OK', [('Content-Length', '9')]); raise RuntimeError('fails at the first item'); yield b''
def fail_later(e, s):
    s('200 OK', [] if e['QUERY_STRING'] else [('Content-Length', '9')])
    yield b'part'; raise RuntimeError('fails at a later item')
def none(e, s):
    s('200 OK', [])
def a_str(e, s):
    s('200 OK', []); return 'text'
def str_items(e, s):
    s('200 OK', []); return ['text']
def an_int(e, s):
    s('200 OK', []); return 5
def no_start(e, s):
    return [b'x']
def twice(e, s):
    s('200 OK', []); s('200 OK', []); return [b'x']
def replaced(e, s):
    s('200 OK', [('X-A', '1')])
    try: raise RuntimeError('inner')
    except RuntimeError: s('500 Oops', [('X-B', '2')], sys.exc_info())
    return [b'oops']
def exc_info_late(e, s):
    s('200 OK', [('Content-Length', '9')]); yield b'part'
    try: raise KeyError('the original error')
    except KeyError: s('500 Oops', [], sys.exc_info())
    yield b'never'
def too_little(e, s):
    s('200 OK', [('Content-Length', '9')]); return [b'part']
def a_str_of_the_length(e, s):
    s('200 OK', [('Content-Length', '4')]); return ['part']
PARTS = [b'part', b'more']
def write_and_constant(e, s):
    s('200 OK', [('Content-Length', '12')])(b'head'); return eval(e['QUERY_STRING'] or 'PARTS')
def too_much(e, s):
    s('200 OK', [('Content-Length', '4')]); return [b'partial', b'more']
def exits(e, s):
    sys.exit(3)
def bad_head(e, s):
    status, headers = eval(e['QUERY_STRING']); s(status, headers); return [b'x']
def write_input(e, s):
    e['wsgi.input'].write(b'x'); s('200 OK', []); return [b'x']
class Head(str, enum.Enum):
    NAME = 'X-Name'; VALUE = 'value'; STATUS = '404 Not Found'
def enum_head(e, s):
    s(Head.STATUS, [(Head.NAME, Head.VALUE)]); return [b'x']
def status(e, s):
    s(e['QUERY_STRING'].replace('+', ' '), [('Content-Length', '4')]); return [b'body']

class Closing:
    closed = 0
    def __init__(self, items): self.items = iter(items)
    def __iter__(self): return self
    def __next__(self):
        item = next(self.items)
        if item is None: raise RuntimeError('fails while iterating')
        return item
    def close(self):
        Closing.closed += 1
        if self.fail: raise RuntimeError('fails in close')
    fail = False
def closing(e, s):
    s('200 OK', [] if e['QUERY_STRING'] != 'little' else [('Content-Length', '99')])
    result = Closing({'': [b'a', b'b'], 'broken': [b'a', None], 'big': [b'x' * 100000] * 1000, 'little': [b'a'],
                      'close': [b'a']}[e['QUERY_STRING']])
    result.fail = e['QUERY_STRING'] == 'close'
    return result
def closed(e, s):
    s('200 OK', []); return [b'%d' % Closing.closed]

def file(e, s):
    f = open(e['HTTP_FILE'], 'rb'); f.seek(int(e.get('HTTP_SEEK', 0)))
    s('200 OK', [('Content-Length', e['HTTP_LENGTH'])] if 'HTTP_LENGTH' in e else [])
    return e['wsgi.file_wrapper'](f, 4096)
def unzipped(e, s):
    import gzip
    file = gzip.open('zipped', 'w'); file.write(b'unzipped'); file.close()
    s('200 OK', []); file = gzip.open('zipped')
    return e['wsgi.file_wrapper'](io.BufferedReader(file) if e['QUERY_STRING'] else file)
def bytesio(e, s):
    s('200 OK', []); return e['wsgi.file_wrapper'](io.BytesIO(b'x' * 100000))
def pipe(e, s):
    r, w = os.pipe(); os.write(w, b'from a pipe'); os.close(w)
    s('200 OK', []); return e['wsgi.file_wrapper'](os.fdopen(r, 'rb'))
def big(e, s):
    s('200 OK', [('Content-Length', '2000000')]); return [b'x' * 1000000, b'y' * 1000000]
def descriptors(e, s):
    s('200 OK', []); return [str(len(os.listdir('/proc/self/fd'))).encode()]
def pid(e, s):
    s('200 OK', []); return [b'%d' % os.getpid()]
'''


class TestWSGI:
    """PEP 3333, and what it leaves open answered as a user would expect."""

    @pytest.mark.parametrize('path, body', [
        ('hello', 'hello\n'), ('no_length', 'hello\n'), ('chunks', 'abc'), ('generator', 'ab'), ('late_start', 'x'),
        ('only_bytes', 'whole'), ('write', 'abc'), ('empty', ''), ('bytesio', 'x' * 100000), ('pipe', 'from a pipe'),
        ('unzipped', 'unzipped'), ('unzipped?buffered', 'unzipped'), ('replaced', 'oops')], ids=lambda text: text[:40])
    def test_what_the_application_returns_is_what_the_client_gets(self, apps, path, body):
        assert apps.ask(path).text == body

    def test_the_environ_is_what_pep_3333_asks_for(self, apps):
        environ = eval(apps.ask('environ', HTTP_CONTENT_LENGTH='7', HTTP_CONTENT_TYPE='x').body)
        assert {'HTTP_CONTENT_LENGTH', 'HTTP_CONTENT_TYPE'}.isdisjoint(environ)
        expected = {'SCRIPT_NAME': '', 'wsgi.version': '(1, 0)', 'wsgi.url_scheme': 'http', 'wsgi.multithread': 'False',
                    'wsgi.multiprocess': 'False', 'wsgi.run_once': 'False', 'wsgi.input_terminated': 'True'}
        assert {key: environ[key] for key in expected} == expected

    @pytest.mark.parametrize('variables, scheme', [
        ({}, 'http'), ({'REQUEST_SCHEME': 'https'}, 'https'), ({'HTTPS': 'on'}, 'https'), ({'HTTPS': ''}, 'http'),
        ({'HTTPS': 'off'}, 'http'), ({'UWSGI_SCHEME': 'https'}, 'https'),
        ({'HTTP_X_FORWARDED_PROTO': 'https'}, 'http')])
    def test_the_scheme_is_what_the_web_server_says(self, apps, variables, scheme):
        for _ in range(3):
            assert eval(apps.ask('environ', **variables).body)['wsgi.url_scheme'] == scheme

    @pytest.mark.parametrize('call, value', [
        ('i.read()', b'one\ntwo\nthree'), ('i.read(-1)', b'one\ntwo\nthree'), ('i.read(0)', b''),
        ('i.read(5)', b'one\nt'),
        ('(i.read(100),i.read(),i.read(5))', (b'one\ntwo\nthree', b'', b'')), ('i.readline()', b'one\n'),
        ('i.readline(2)', b'on'), ('(i.readline(),i.read())', (b'one\n', b'two\nthree')),
        ('list(i)', [b'one\n', b'two\n', b'three']),
        ('i.readlines()', [b'one\n', b'two\n', b'three']), ('i.readlines(1)', [b'one\n'])])
    @pytest.mark.parametrize('late', [False, True])
    def test_the_input_reads_like_a_file_and_never_past_its_end(self, apps, call, value, late):
        """late: the body doesn't come with the head, and the connection stays open behind it."""
        body = b'one\ntwo\nthree'
        data = packet('read', body, QUERY_STRING=call)
        with connect(apps.socket) as connection:
            connection.sendall(data[:-len(body)] if late else data)
            if late:
                for i in range(len(body)):
                    connection.sendall(body[i:i + 1])
            assert eval(Answer(read_all(connection)).body) == value

    @pytest.mark.parametrize('call, value', [('i.read()', b''), ('i.read(5)', b''), ('i.readline()', b''), ('list(i)',
        []),
                                             ('i.readlines()', [])])
    def test_a_request_without_a_body_has_an_empty_input(self, apps, call, value):
        assert eval(apps.ask('read', QUERY_STRING=call).body) == value

    def test_a_body_of_any_size(self, apps):
        for size in 1, 65000, 65535, 70000, 3000000:
            assert eval(apps.ask('read', b'x' * size, QUERY_STRING='len(i.read())').body) == size

    def test_a_body_that_ends_early_is_an_error_for_the_application(self, apps):
        apps.tracebacks_expected = True
        with connect(apps.socket) as connection:
            connection.sendall(packet('read', b'abc', QUERY_STRING='i.read()', CONTENT_LENGTH='10'))
            connection.shutdown(socket.SHUT_WR)
            assert b'200 OK' not in read_all(connection)

    def test_a_body_that_ended_early_is_never_taken_for_whole(self, start):
        server = start("""
            def application(environ, start_response):
                found = []
                for _ in range(3):
                    try:
                        found.append(environ['wsgi.input'].read(10))
                    except Exception as error:
                        found.append(type(error).__name__)
                start_response('200 OK', [])
                return [repr(found).encode()]
            """, http=True)
        chunked = b'POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nx\r\n'
        assert Answer(send_raw(server, chunked)).text == "400 Bad Request: no size of a chunk: b'x'\n"
        with connect(server.socket) as connection:
            connection.sendall(packet(body=b'abcd')[:-1])
            connection.shutdown(socket.SHUT_WR)
            assert eval(Answer(read_all(connection)).body) == ['ClientGone'] * 3

    def test_bodies_need_no_garbage_collector(self, start):
        server = start("""
            import gc
            gc.disable()
            def application(environ, start_response):
                environ['wsgi.input'].read(int(environ['CONTENT_LENGTH']))
                start_response('200 OK', [])
                return [b'%d' % sum(type(one).__name__ == 'Body' for one in gc.get_objects())]
            """)
        for _ in range(5):
            answer = server.ask(body=b'x' * 100000)
        assert answer.body == b'1'

    @pytest.mark.parametrize('size', [100, 3000000])
    def test_an_unread_body_never_breaks_the_answer(self, apps, size):
        for _ in range(5):
            answer = apps.ask('unread', b'x' * size)
            assert (answer.status, answer.body) == ('401 Unauthorized', b'no')

    def test_wsgi_errors_is_the_log_at_once(self, apps):
        apps.ask('errors')
        apps.wait_for('written to wsgi.errors')

    @pytest.mark.parametrize('path, words', [
        ('fail_early', 'fails before the head'), ('fail_after_start', 'fails after the head'),
        ('fail_first', 'first item'),
        ('none', 'returned None'), ('a_str', 'made of bytes, not of str'), ('str_items', 'made of bytes, not of str'),
        ('an_int', "'int' object is not iterable"), ('no_start', "didn't call start_response"),
        ('twice', 'a second time'), ('a_str_of_the_length', 'bytes'),
        ('exits', 'SystemExit: 3')])
    def test_an_application_that_fails_early_gives_a_500_and_a_traceback(self, apps, path, words):
        apps.tracebacks_expected = True
        before, pid = len(apps.lines), apps.ask('pid').body
        assert apps.ask(path).status == '500 Internal Server Error'
        wait_until(lambda: any(words in line for line in apps.lines[before:]), words)
        wait_until(lambda: path != 'exits' or apps.ask('pid').body != pid, 'the successor')     # not in a later test
        assert apps.ask('hello').status == '200 OK'

    @pytest.mark.parametrize('path, words', [
        ('fail_later', 'fails at a later item'), ('exc_info_late', 'the original error'),
        ('too_little', '5 bytes less')])
    def test_a_response_that_breaks_off_is_never_made_whole(self, apps, path, words):
        apps.tracebacks_expected = True
        answer = apps.ask(path)
        assert answer.status == '200 OK' and answer.body in (b'part', b'') and answer.header('content-length') == '9'
        apps.wait_for(words)

    @pytest.mark.parametrize('body', [b'', b'x' * 200000], ids=['empty', 'large'])
    def test_nor_where_the_end_of_the_connection_is_its_end(self, apps, body):
        apps.tracebacks_expected = True
        with connect(apps.http) as connection, pytest.raises(ConnectionResetError):
            connection.sendall(b'POST /fail_later?0 HTTP/1.0\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
            while connection.recv(1000):
                pass

    @pytest.mark.parametrize('result', ['', 'tuple(PARTS)'])
    def test_a_list_of_the_application_stays_as_it_is_after_write(self, apps, result):
        for _ in range(3):
            assert apps.ask('write_and_constant', QUERY_STRING=result).body == b'headpartmore'

    def test_a_stream_that_may_not_be_sent_any_more_holds_nobody(self, start):
        server = start("""
            import itertools
            def application(e, s):
                length = [('Content-Length', '3')] if e['PATH_INFO'] == '/long' else []
                s('200 OK', length)
                return (b'abc' for _ in itertools.count())
            """, 'processes = 4', http=True)
        with concurrent.futures.ThreadPoolExecutor() as clients:        # each takes a second
            answers = [clients.submit(server.ask, REQUEST_METHOD='HEAD'), clients.submit(server.ask, '/long'),
                       clients.submit(server.get, method='HEAD'), clients.submit(server.get, '/long')]
            assert [answer.result().body for answer in answers] == [b'', b'abc', b'', b'abc']
        assert 0 < server.log.count('more than its Content-Length') < 5          # not a line for each chunk

    def test_a_generator_is_run_to_its_end_though_nothing_more_may_be_sent(self, start):
        server = start("""
            def application(e, s):
                s('200 OK', [('Content-Length', '3')] if e['PATH_INFO'] == '/long' else [])
                for _ in range(3):
                    yield b'abc'
                print('its end')
            """)
        assert server.ask(REQUEST_METHOD='HEAD').body == b'' and server.ask('/long').body == b'abc'
        server.wait_for('its end', 2)

    def test_the_head_waits_for_the_first_byte(self, start):
        """PEP 3333: until then the application may change its mind."""
        server = start("""
            import sys
            def application(e, s):
                s('200 OK', [])
                yield b''
                try:
                    1 / 0
                except ZeroDivisionError:
                    s('503 Not Now', [], sys.exc_info())
                yield b'sorry'
            """, http=True)
        assert (server.ask().status, server.ask().body) == ('503 Not Now', b'sorry')
        assert server.get().status == '503 Not Now' and b'sorry' in server.get().body

    def test_what_is_wrong_with_a_body_is_answered_whatever_the_application_makes_of_it(self, start):
        server = start("""
            def application(e, s):
                try:
                    e['wsgi.input'].read()
                except Exception:
                    s('500 Mine', [])
                    return [b'mine']
            """, 'limit-post = 10', http=True)
        for body, status in (b'b\r\nhello world\r\n0\r\n\r\n', '413'), (b'x\r\n', '400'):
            answer = server.get(method='POST', headers='Transfer-Encoding: chunked\r\n', body=body)
            assert answer.status[:3] == status and answer.body[:3] == status.encode()

    def test_more_than_the_promised_length_is_left_out_and_logged(self, apps):
        assert apps.ask('too_much').body == b'part'
        apps.wait_for('more than its Content-Length')

    @pytest.mark.parametrize('query', ['', 'broken', 'close', 'little'])
    def test_close_is_called_once_whatever_happens(self, apps, query):
        apps.tracebacks_expected = True
        before = int(apps.ask('closed').body)
        apps.ask('closing', QUERY_STRING=query)
        assert int(apps.ask('closed').body) == before + 1

    def test_close_is_called_when_the_client_leaves(self, apps):
        before = int(apps.ask('closed').body)
        with connect(apps.socket) as connection:
            connection.sendall(packet('closing', QUERY_STRING='big'))
            connection.recv(1)
        wait_until(lambda: int(apps.ask('closed').body) == before + 1, 'close()')
        assert 'Broken' not in apps.log

    @pytest.mark.parametrize('status, headers', [
        (200, []), (b'200 OK', []), ('OK', []), ('2000 OK', []), ('200 OK\r\nX: y', []), ('20x OK', []), ('', []),
        ('200 OK', [('X', 'a\r\nY: b')]), ('200 OK', [('X', 'a\nb')]), ('200 OK', [('X', 'a\0')]),
        ('200 OK', [('X\r\nY', 'b')]),
        ('200 OK', [('X: Y', 'b')]), ('200 OK', [('', 'b')]), ('200 OK', [('X', 5)]), ('200 OK', [(b'X', 'b')]),
        ('200 OK', [('X', b'b')]), ('200 OK', [('X', '\u20ac')]), ('200 OK', [('Content-Length', '-1')]),
        ('200 OK', [('Content-Length', 'many')]), ('200 OK', None), ('200 OK', [('X',)])])
    def test_a_bad_head_is_refused(self, apps, status, headers):
        apps.tracebacks_expected = True
        answer = apps.ask('bad_head', QUERY_STRING=ascii((status, headers)))
        assert answer.status == '500 Internal Server Error' and answer.header('Y') is None

    def test_what_the_members_of_an_enum_hold_is_sent(self, apps):
        """On Python 3.12 str() and format() give their names instead."""
        for _ in 'new', 'known':
            answer = apps.ask('enum_head')
            assert answer.status == '404 Not Found' and answer.header('X-Name') == 'value'

    def test_what_is_equal_to_a_status_is_none(self, apps):
        apps.tracebacks_expected = True
        status = "type('P', (), {'__eq__': lambda s, o: o == '200 OK', '__hash__': lambda s: hash('200 OK')})()"
        assert apps.ask('bad_head', QUERY_STRING="'200 OK', []").status == '200 OK'
        for bad in status, '["200 OK"]':
            assert apps.ask('bad_head', QUERY_STRING=f'{bad}, []').status[:3] == '500'
        apps.wait_for('the status must be a str, not list')

    def test_what_is_written_into_an_empty_input_reaches_nobody(self, apps):
        apps.tracebacks_expected = True
        assert apps.ask('write_input').status[:3] == '500' and apps.ask('read', QUERY_STRING='i.read()').body == b"b''"

    def test_a_number_for_the_content_length_is_refused_in_words(self, apps):
        apps.tracebacks_expected = True
        assert apps.ask('bad_head', QUERY_STRING="'200 OK', [('Content-Length', 5)]").status[:3] == '500'
        apps.wait_for('the value of Content-Length must be a str, not int')

    @pytest.mark.parametrize('method, status, body', [
        ('HEAD', '200+OK', b''), ('GET', '204+No+Content', b''), ('GET', '304+Not+Modified', b''),
        ('GET', '200+OK', b'body'),
        ('GET', '404', b'body')])
    def test_no_body_where_there_is_none(self, apps, method, status, body):
        answer = apps.ask('status', QUERY_STRING=status, REQUEST_METHOD=method)
        assert answer.body == body and answer.status.strip() == status.replace('+', ' ')

    def test_head_of_everything(self, apps, tmp):
        (tmp / 'f').write_bytes(b'x' * 1000)
        for path in 'hello', 'generator', 'write', 'chunks', 'file', 'empty':
            answer = apps.ask(path, REQUEST_METHOD='HEAD', HTTP_FILE=str(tmp / 'f'))
            assert (answer.status, answer.body) == ('200 OK', b'')

    def test_no_head_of_an_earlier_request_is_ever_sent(self, apps):
        """no_start and hello answer with bodies of the same length; only one of them gave a head."""
        apps.tracebacks_expected = True
        for ask_ in apps.ask, lambda path: apps.get('/' + path):
            assert ask_('same_length').header('set-cookie') == 'session=alice'
            answer = ask_('no_start')
            assert answer.status.startswith('500') and answer.header('set-cookie') is None

    def test_a_close_that_fails_does_not_harm_the_response(self, apps):
        apps.tracebacks_expected = True
        assert apps.get('/closing?close').body.endswith(b'a\r\n0\r\n\r\n')

    def test_the_validator_finds_nothing(self, start):
        server = start("""
            from wsgiref.validate import validator
            @validator
            def application(environ, start_response):
                body = environ['wsgi.input'].read(int(environ.get('CONTENT_LENGTH') or 0))
                environ['wsgi.errors'].write('')
                start_response('200 OK', [('Content-Type', 'text/plain'), ('Content-Length', str(len(body) + 1))])
                return iter([body, b'.'])
            """, http=True)
        assert server.ask().body == b'.'
        assert server.ask(body=b'abc').body == b'abc.'
        assert server.get().body == b'.'
        assert server.get(method='POST', headers='Content-Length: 3\r\n', body=b'abc').body == b'abc.'
        assert 'Assert' not in server.log

    def test_mounts_divide_the_url(self, start, tmp):
        for name in 'one', 'two':
            (tmp / f'{name}.py').write_text(
                f'def application(e, s):\n    s("200 OK", [])\n    return ["{name} ".encode() + '
                'f"{e[\'SCRIPT_NAME\']} {e[\'PATH_INFO\']}".encode()]')
        server = start(ini='mount = /a=one:application\nmount = /a/b=two.py\nmanage-script-name')
        for path, text in (('/a/x', 'one /a /x'), ('/a', 'one /a '), ('/a/b/c', 'two /a/b /c'),
                ('/a/bc', 'one /a /bc')):
            assert server.ask(path).text == text
        assert server.ask('/ax').status == '404 Not Found'

    def test_djangos_module_can_be_mounted_and_files_of_one_name_are_modules_of_their_own(self, start, tmp):
        for site in 'one', 'two':
            (tmp / site).mkdir()
            (tmp / site / 'wsgi.py').write_text(
                f'import sys\nsite = "{site}"\ndef application(e, s):\n    s("200 OK", [])\n'
                '    return [sys.modules[__name__].site.encode()]\n')
        server = start(ini='mount = /a=one/wsgi.py\nmount = /b=two/wsgi.py\nmount = /c=two.wsgi:application\n'
                           'manage-script-name')
        assert [server.ask(path).text for path in ('/a', '/b', '/c')] == ['one', 'two', 'two']

    def test_a_file_takes_the_place_of_a_module_that_is_not_there(self, start):
        server = start(HELLO, 'module = nix\nwsgi-file = app.py')
        assert server.ask().body == b'hello\n'
        assert "app.ini:2: there is no module 'nix'" in server.wait_for('wsgi-file takes its place')

    def test_a_file_may_have_a_colon_in_its_name(self, start, tmp):
        (tmp / 'a:b').mkdir()
        (tmp / 'a:b' / 'app.py').write_text(HELLO)
        assert start(HELLO, 'wsgi-file = a:b/app.py').ask().body == b'hello\n'
        assert start(HELLO, 'mount = /=a:b/app.py:application\nsocket = t').wait_for('^ready')

    @pytest.mark.parametrize('ini', ['mount = /a = app.py:other', 'mount = /a=app:other', 'wsgi-file = app.py:other',
                                     'mount = /a=app:other\nmount = /b=app:application'])
    def test_without_a_module_the_first_mount_answers_what_no_mount_fits(self, start, ini):
        server = start(HELLO + ENVIRON_APP.replace('application', 'other'), ini)
        for path in '/', '/a/x':
            environ = eval(server.ask(path).body)
            assert (environ['SCRIPT_NAME'], environ['PATH_INFO']) == ('', path)

    def test_a_mount_is_found_by_script_name(self, start):
        server = start(HELLO + ENVIRON_APP.replace('application', 'other'), 'module = app\nmount = /a=app:other')
        assert server.ask('/x').body == b'hello\n'
        assert eval(server.ask('/x', SCRIPT_NAME='/a').body)['SCRIPT_NAME'] == '/a'


# ---------------------------------------------------------------------------------------------
# 7. Static files

FALLS_THROUGH = "def application(e, s):\n    s('404 Not Found', [('Content-Length', '3')])\n    return [b'app']\n"
FILES = [('root/a.txt', b'0123456789'), ('root/sub/b.css', b'css'), ('root/sub/index.html', b'index'),
         ('root/a b.js', b'js'),
         ('root/\xe4.txt', b'umlaut'), ('root/c.tar.gz', b'gz'), ('root/d.unknown-type', b'?'), ('root/empty.txt', b''),
         ('root/big.bin', bytes(range(256)) * 20000), ('root/no-index/x', b''), ('rootless/secret', b'secret'),
         ('secret', b'secret'), ('elsewhere/e.txt', b'else'), ('icon', b'icon'), ('checked/z.txt', b'checked'),
         ('second/m2/y.txt', b'map2'), ('second/m2x/w.txt', b'not mapped')]


@pytest.fixture(scope='module')
def static():
    ini = '''
        static-map = /s=root
        static-map = /icon.ico=icon
        static-map2 = /m2=second
        check-static = checked
        static-map = /linked=link
        static-map = /absent=nowhere
        static-index = index.html
        static-safe = elsewhere
        static-expires = *.css 3600
        static-expires = /s/sub/* 60
        static-expires = \\.js$ 120
        disable-logging = true
        processes = 1
        '''
    with running(FALLS_THROUGH, ini, FILES) as server:
        root = server.directory / 'root'
        os.symlink('a.txt', root / 'link.txt')
        os.symlink('../secret', root / 'out.txt')
        os.symlink('../elsewhere', root / 'safe')
        os.symlink('..', root / 'up')
        os.symlink('loop', root / 'loop')
        os.symlink('root', server.directory / 'link')
        os.mkfifo(root / 'fifo')
        yield server


SERVED = [('/s/a.txt', b'0123456789', 'text/plain'), ('/s/sub/b.css', b'css', 'text/css'),
          ('/s/sub/', b'index', 'text/html'),
          ('/s/sub', b'index', 'text/html'), ('/s/a%20b.js', b'js', None), ('/s/%C3%A4.txt', b'umlaut', 'text/plain'),
          ('/s/c.tar.gz', b'gz', 'application/gzip'), ('/s/d.unknown-type', b'?', 'application/octet-stream'),
          ('/s/empty.txt', b'', 'text/plain'), ('/s/big.bin', bytes(range(256)) * 20000, 'application/octet-stream'),
          ('/s/link.txt', b'0123456789', 'text/plain'), ('/s/safe/e.txt', b'else', 'text/plain'),
          ('/s//a.txt', b'0123456789', None),
          ('/s/%61.txt', b'0123456789', 'text/plain'),
          ('/z.txt', b'checked', None),
          ('/m2/y.txt', b'map2', None), ('/icon.ico', b'icon', None), ('/linked/a.txt', b'0123456789', None),
          ('/s/a.txt?v=1', b'0123456789', 'text/plain')]
MISSED = ['/', '/s', '/s/', '/s/none', '/sa.txt', '/s/a.txt/', '/s/a.txt/x', '/s/sub/../a.txt',
          '/s/../secret', '/s/%2e%2e/secret', '/s/..%2fsecret',
          '/s/sub/../../secret', '/s/../rootless/secret', '/s/..%2frootless%2fsecret', '/s%2f..%2fsecret',
          '/s/out.txt', '/s/up/secret',
          '/s/up/root/../secret', '/s/loop', '/s/fifo', '/s/no-index/', '/s/a.txt%00', '/s/%00',
          '/s/' + 'a' * 300, '/s/' + 'a/' * 4000,
          '/s/..', '/s/.', '/s//etc/passwd', '/icon.ico/', '/icon.ico/x', '/absent/x', '/../secret', '/..%5csecret',
          '/s/%ff',
           '/m2/../z', '/m2x/w.txt', '/sub/a.txt', '/S/a.txt']


@pytest.mark.parametrize('target, body, kind', SERVED, ids=[row[0] for row in SERVED])
def test_static_file_is_served(static, target, body, kind):
    path = minuwsgi.unquote(target.partition('?')[0])
    for answer in static.get(target), static.ask(target, PATH_INFO=path):
        assert (answer.status, answer.header('Content-Length')) == ('200 OK', str(len(body)))
        assert answer.body == body and kind in (None, answer.header('Content-Type'))
        assert answer.header('ETag') and answer.header('Last-Modified') and answer.header('Accept-Ranges') == 'bytes'
    for answer in static.get(target, method='HEAD'), static.ask(target, PATH_INFO=path, REQUEST_METHOD='HEAD'):
        assert (answer.body, answer.header('Content-Length')) == (b'', str(len(body)))


@pytest.mark.parametrize('target', MISSED, ids=[target[:40] for target in MISSED])
def test_what_is_no_file_of_the_root_is_left_to_the_application(static, target):
    for answer in static.get(target), static.ask(target, PATH_INFO=minuwsgi.unquote(target)):
        assert (answer.status, answer.body) == ('404 Not Found', b'app')


@pytest.mark.parametrize('method', ['POST', 'PUT', 'DELETE', 'OPTIONS', 'get'])
def test_static_files_are_for_get_and_head(static, method):
    assert static.get('/s/a.txt', method=method).body == b'app'


NO_RANGE = b'416 Range Not Satisfiable: 10 bytes\n'
CONDITIONS = [                                  # headers (T: the ETag, M: Last-Modified), status, body, Content-Range
    ('If-None-Match: T', 304, b'', None), ('If-None-Match: W/T', 304, b'', None),
    ('If-None-Match: "x", T', 304, b'', None),
    ('If-None-Match: *', 304, b'', None), ('If-None-Match: "x"', 200, b'0123456789', None),
    ('If-None-Match: "x"\r\nIf-Modified-Since: M', 200, b'0123456789', None), ('If-Modified-Since: M', 304, b'', None),
    ('If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT', 304, b'', None),
    ('If-Modified-Since: junk', 200, b'0123456789', None),
    ('If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT', 200, b'0123456789', None),
    ('If-Modified-Since:', 200, b'0123456789', None),
    ('If-Modified-Since: Mon, 99 Jan 99999999 00:00:00 GMT', 200, b'0123456789', None),
    (f'If-Modified-Since: Mon, 01 Jan {10 ** 24} 00:00:00 GMT', 200, b'0123456789', None),
    (f'If-Modified-Since: Mon, 01 Jan 2024 00:00:00 +{10 ** 24}', 200, b'0123456789', None),
    ('Range: bytes=0-3', 206, b'0123', 'bytes 0-3/10'), ('Range: bytes=8-', 206, b'89', 'bytes 8-9/10'),
    ('Range: bytes=-3', 206, b'789', 'bytes 7-9/10'), ('Range: bytes=5-99', 206, b'56789', 'bytes 5-9/10'),
    ('Range: bytes=-99', 206, b'0123456789', 'bytes 0-9/10'), ('Range: BYTES = 1 - 2', 206, b'12', 'bytes 1-2/10'),
    ('Range: bytes=10-', 416, NO_RANGE, 'bytes */10'), ('Range: bytes=-0', 416, NO_RANGE, 'bytes */10'),
    ('Range: bytes=3-1', 200, b'0123456789', None), ('Range: bytes=0-1,3-4', 200, b'0123456789', None),
    ('Range: lines=0-1', 200, b'0123456789', None), ('Range: bytes=a-b', 200, b'0123456789', None),
    ('Range: bytes=-', 200, b'0123456789', None), ('Range: bytes=1', 200, b'0123456789', None),
    ('Range:', 200, b'0123456789', None),
    ('Range: bytes=' + '9' * 5000 + '-', 200, b'0123456789', None), ('Range: bytes=--1', 200, b'0123456789', None),
    ('Range: bytes=0-3\r\nIf-Range: T', 206, b'0123', 'bytes 0-3/10'),
    ('Range: bytes=0-3\r\nIf-Range: M', 206, b'0123', 'bytes 0-3/10'),
    ('Range: bytes=0-3\r\nIf-Range: "x"', 200, b'0123456789', None),
    ('Range: bytes=0-3\r\nIf-Range: W/T', 200, b'0123456789', None),
    ('Range: bytes=0-3\r\nIf-None-Match: T', 304, b'', None),
]


@pytest.mark.parametrize('headers, status, body, content_range', CONDITIONS, ids=[row[0][:50] for row in CONDITIONS])
def test_conditions_and_ranges(static, headers, status, body, content_range):
    known = static.get('/s/a.txt')
    headers = headers.replace(' T', f' {known.header("ETag")}').replace('W/T', f'W/{known.header("ETag")}')
    headers = re.sub(': M$', f': {known.header("Last-Modified")}', headers)
    answer = static.get('/s/a.txt', headers=headers + '\r\n')
    assert (int(answer.status[:3]), answer.body, answer.header('Content-Range')) == (status, body, content_range)
    assert answer.header('Content-Length') == (None if status == 304 else str(len(body)))
    assert (answer.header('ETag') == known.header('ETag')) == (status != 416)


@pytest.mark.parametrize('target, seconds', [('/s/sub/b.css', 3600), ('/s/sub/', 60), ('/s/a%20b.js', 120),
('/s/a.txt', None)])
def test_static_expires(static, target, seconds):
    from email.utils import parsedate_to_datetime
    answer = static.get(target)
    assert answer.header('Cache-Control') == (seconds and f'max-age={seconds}')
    if seconds:
        assert abs(parsedate_to_datetime(answer.header('Expires')).timestamp() - time.time() - seconds) < 3
        again = static.get(target, headers=f'If-None-Match: {answer.header("ETag")}\r\n')
        assert again.status[:3] == '304' and again.header('Cache-Control') == f'max-age={seconds}'


def test_a_slow_download_holds_nobody_and_its_connection_is_kept(static):
    with Kept(static) as client:
        client.send('GET /s/big.bin HTTP/1.1', 'Host: x', 'Range: bytes=256-5000000')
        assert static.get('/s/a.txt').status == '200 OK'
        answer = client.answer()
        assert answer.body == (bytes(range(256)) * 20000)[256:5000001]
        assert client.get('/s/a.txt').body == b'0123456789'


@pytest.mark.parametrize('expires', ['*.css soon', '*.css', '*( 5'])
def test_static_expires_that_cannot_be_read_stops_the_start(tmp, expires):
    (tmp / 'app.py').write_text(FALLS_THROUGH)
    code, output = run(tmp, '--http-socket', f'127.0.0.1:{free_port()}', '--check-static', '.',
                       '--static-expires', expires, 'app.py')
    assert code == minuwsgi.EXIT_NO_APP and f'static-expires = {expires}' in output


def test_a_browser_loads_a_page_with_30_files_over_kept_connections(start):
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if chromium is None:
        pytest.skip('chromium is not installed')
    names = [f'{i}.{kind}' for i in range(10) for kind in ('css', 'js', 'svg')]
    tags = {'css': '<link rel=stylesheet href=/s/%s>', 'js': '<script src=/s/%s></script>', 'svg': '<img src=/s/%s>'}
    page = '<!doctype html><title>t</title>' + ''.join(tags[name[2:]] % name for name in names) + \
        '<p id=p></p><script>addEventListener("load", () => { p.textContent = "scripts " + window.n + " images " + ' \
        '[...document.images].filter(i => i.naturalWidth).length + " sheets " + [...document.styleSheets].filter(' \
        's => s.cssRules.length).length })</script>'
    app = f'''
PAGE = {page!r}.encode()

def application(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/html')])
    return [PAGE]
'''
    server = start(app, 'static-map = /s=files', http=True)
    files = server.directory / 'files'
    files.mkdir()
    contents = {'css': 'p { color: red }', 'js': 'window.n = (window.n || 0) + 1',
                'svg': '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'}
    for name in names:
        (files / name).write_text(contents[name[2:]])
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run([chromium, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
                               '--no-first-run',
                               '--disable-background-networking', '--disable-component-update', '--disable-sync',
                               f'--user-data-dir={profile}', '--virtual-time-budget=5000', '--dump-dom',
                               f'http://127.0.0.1:{server.http[1]}/'],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert b'scripts 10 images 10 sheets 10' in done.stdout, (done.stdout[-500:], done.stderr[-500:], server.log)
    assert sum(f'GET /s/{name} ' in server.log for name in names) == 30


# ---------------------------------------------------------------------------------------------
# 7b. Other languages: the real interpreters behind the real nginx
#
# Each language runs the same little site: / says hello and what was asked, /echo gives the body back,
# /cookies sets two cookies, /error fails, all else is a 404. Debian's packages: ruby ruby-rack perl
# libplack-perl php-cgi golang-go sbcl nginx-light.

CONFIG_RU = r'''
require 'uri'
require 'rack/lint'
use Rack::Lint
run(lambda { |env|
  text = { 'Content-Type' => 'text/plain' }
  case env['PATH_INFO']
  when '/' then [200, text, ["hello from #{Process.pid}, you asked #{env['QUERY_STRING']}"]]
  when '/echo' then [200, { 'Content-Type' => 'application/octet-stream' }, env['rack.input']]
  when '/cookies' then [200, { 'Content-Type' => 'text/plain', 'Set-Cookie' => "a=1\nb=2" }, ['both']]
  when '/error' then raise 'oops'
  else [404, text, ['not here']]
  end
})
'''

APP_PSGI = r'''
use Plack::Middleware::Lint;
Plack::Middleware::Lint->wrap(sub {
    my $env = shift;
    my ($path, @text) = ($env->{PATH_INFO}, 'Content-Type' => 'text/plain');
    return [200, [@text], ["hello from $$, you asked $env->{QUERY_STRING}"]] if $path eq '/';
    return sub {
        my $writer = shift->([200, ['Content-Type' => 'application/octet-stream']]);
        while ($env->{'psgi.input'}->read(my $data, 65536)) { $writer->write($data) }
        $writer->close;
    } if $path eq '/echo';
    return [200, [@text, 'Set-Cookie' => 'a=1', 'Set-Cookie' => 'b=2'], ['both']] if $path eq '/cookies';
    die 'oops' if $path eq '/error';
    return [404, [@text], ['not here']];
});
'''

INDEX_PHP = r'''<?php
header('Content-Type: text/plain');
$path = parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH);
if ($path == '/') { echo 'hello from ', getmypid(), ', you asked ', $_SERVER['QUERY_STRING']; }
elseif ($path == '/echo') { readfile('php://input'); }
elseif ($path == '/cookies') { setcookie('a', '1'); setcookie('b', '2'); echo 'both'; }
elseif ($path == '/error') { throw new Exception('oops'); }
else { http_response_code(404); echo 'not here'; }
'''

HELLO_GO = r'''
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/fcgi"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

func site(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/":
		fmt.Fprintf(w, "hello from %d, you asked %s", os.Getpid(), r.URL.RawQuery)
	case "/echo":
		body, _ := io.ReadAll(r.Body)
		w.Write(body)
	case "/cookies":
		http.SetCookie(w, &http.Cookie{Name: "a", Value: "1"})
		http.SetCookie(w, &http.Cookie{Name: "b", Value: "2"})
		io.WriteString(w, "both")
	case "/error":
		http.Error(w, "oops", 500)
	default:
		http.Error(w, "not here", 404)
	}
}

// net/http/fcgi has no Shutdown: count the connections, to see when the last is done.
type counting struct {
	net.Listener
	open sync.WaitGroup
}

type counted struct {
	net.Conn
	once sync.Once
	done func()
}

func (l *counting) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.open.Add(1)
	return &counted{Conn: conn, done: l.open.Done}, nil
}

func (c *counted) Close() error {
	defer c.once.Do(c.done)
	return c.Conn.Close()
}

func main() {
	inherited, err := net.FileListener(os.Stdin)
	if err != nil {
		panic(err)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	if os.Args[1] == "http" {
		server := &http.Server{Handler: http.HandlerFunc(site)}
		go server.Serve(inherited)
		<-stop
		server.Shutdown(context.Background())
		return
	}
	listener := &counting{Listener: inherited}
	go func() { <-stop; listener.Close() }()
	fcgi.Serve(listener, http.HandlerFunc(site))
	listener.open.Wait()
}
'''

HELLO_LISP = r'''
(require :sb-bsd-sockets)
(defvar *nothing* (sb-unix:unix-open "/dev/null" 0 0))
(sb-sys:enable-interrupt sb-unix:sigterm        ; accept() is restarted after a signal, and then fails
  (lambda (&rest _) (declare (ignore _))
    (sb-alien:alien-funcall (sb-alien:extern-alien "dup2" (function sb-alien:int sb-alien:int sb-alien:int))
                            *nothing* 0)))

(defun octets (text) (sb-ext:string-to-octets text :external-format :latin-1))
(defun take (stream size)
  (let ((data (make-array size :element-type '(unsigned-byte 8))))
    (subseq data 0 (read-sequence data stream))))
(defun size-at (data at) (+ (aref data at) (ash (aref data (1+ at)) 8)))

(defun variables (block)                        ; the block of a uwsgi packet -> ((name . value) ...)
  (loop with at = 0 while (< at (length block))
        collect (flet ((field () (let* ((begin (+ at 2)) (end (+ begin (size-at block at))))
                                   (setf at end)
                                   (sb-ext:octets-to-string (subseq block begin end) :external-format :latin-1))))
                  (let ((name (field))) (cons name (field))))))

(defun site (path query body)                   ; -> status, headers, body
  (cond ((string= path "/")
         (values "200 OK" '() (octets (format nil "hello from ~D, you asked ~A" (sb-unix:unix-getpid) query))))
        ((string= path "/echo") (values "200 OK" '() body))
        ((string= path "/cookies") (values "200 OK" '("Set-Cookie: a=1" "Set-Cookie: b=2") (octets "both")))
        ((string= path "/error") (error "oops"))
        (t (values "404 Not Found" '() (octets "not here")))))

(defun serve (stream)
  (let* ((vars (variables (take stream (size-at (take stream 4) 1))))
         (get (lambda (name) (or (cdr (assoc name vars :test #'string=)) "")))
         (length (or (parse-integer (funcall get "CONTENT_LENGTH") :junk-allowed t) 0))
         (body (take stream length)))
    (multiple-value-bind (status headers answer)
        (handler-case (site (funcall get "PATH_INFO") (funcall get "QUERY_STRING") body)
          (error (problem) (format *error-output* "~A~%" problem)
            (values "500 Internal Server Error" '() (octets "failed"))))
      (dolist (line `(,(format nil "HTTP/1.1 ~A" status) ,@headers
                      ,(format nil "Content-Length: ~D" (length answer)) ""))
        (write-sequence (octets (format nil "~A~C~C" line #\Return #\Newline)) stream))
      (unless (string= (funcall get "REQUEST_METHOD") "HEAD") (write-sequence answer stream))
      (finish-output stream))))

(let ((server (make-instance 'sb-bsd-sockets:local-socket :type :stream :descriptor 0)))
  (loop for client = (ignore-errors (sb-bsd-sockets:socket-accept server)) while client
        do (handler-case (serve (sb-bsd-sockets:socket-make-stream client :input t :output t :buffering :full
                                                                   :element-type '(unsigned-byte 8)))
             (error (problem) (format *error-output* "~A~%" problem)))
           (sb-bsd-sockets:socket-close client)))
'''

CGI_LISP = r'''#!/usr/bin/sbcl --script
(defun say (text &rest arguments) (apply #'format t text arguments) (terpri))
(let* ((get (lambda (name) (or (sb-ext:posix-getenv name) "")))
       (path (funcall get "PATH_INFO")))
  (say "Content-Type: text/plain")
  (cond ((string= path "/")
         (say "")
         (format t "hello from ~D, you asked ~A" (sb-unix:unix-getpid) (funcall get "QUERY_STRING")))
        ((string= path "/echo")
         (say "")
         (finish-output)
         (let ((in (sb-sys:make-fd-stream 0 :element-type '(unsigned-byte 8) :buffering :full))
               (out (sb-sys:make-fd-stream 1 :output t :input nil :element-type '(unsigned-byte 8) :buffering :full))
               (data (make-array 65536 :element-type '(unsigned-byte 8))))
           (loop for size = (read-sequence data in) until (zerop size) do (write-sequence data out :end size))
           (finish-output out)))
        ((string= path "/cookies") (say "Set-Cookie: a=1") (say "Set-Cookie: b=2") (say "") (format t "both"))
        ((string= path "/error") (say "Status: 500 Oops") (say "") (format *error-output* "oops~%"))
        (t (say "Status: 404 Not Found") (say "") (format t "not here"))))
'''

# name: lines of the INI, files, nginx's lines, programs
LANGUAGES = {
    'ruby': ('rack = config.ru', {'config.ru': CONFIG_RU}, 'uwsgi_pass', 'ruby'),
    'perl': ('psgi = app.psgi', {'app.psgi': APP_PSGI}, 'uwsgi_pass', 'perl'),
    'php': ('worker-exec = php-cgi\nenv = PHP_FCGI_MAX_REQUESTS=0', {'index.php': INDEX_PHP},
            'fastcgi_param SCRIPT_FILENAME %s/index.php; fastcgi_pass', 'php-cgi'),
    'php as cgi': ('cgi = index.php\ncgi-helper = .php=php-cgi', {'index.php': INDEX_PHP}, 'uwsgi_pass', 'php-cgi'),
    'go': ('worker-exec = ./hello fcgi', {'hello.go': HELLO_GO}, 'fastcgi_pass', 'go'),
    'go http': ('worker-exec = ./hello http', {'hello.go': HELLO_GO}, 'proxy_pass', 'go'),
    'lisp': ('worker-exec = sbcl --script hello.lisp', {'hello.lisp': HELLO_LISP}, 'uwsgi_pass', 'sbcl'),
    'lisp as cgi': ('cgi = hello.cgi', {'hello.cgi': CGI_LISP}, 'uwsgi_pass', 'sbcl'),
}


def is_there(program):
    """A program, with the library of Ruby or Perl that its applications need."""
    library = {'ruby': ['ruby', '-rrack', '-e', '0'], 'perl': ['perl', '-MPlack', '-MHTTP::Status', '-e', '0']}
    return shutil.which(program) and (program not in library or not subprocess.call(
        library[program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))


MISSING = [name for name, (*_, program) in LANGUAGES.items() if not is_there(program)]
NGINX = shutil.which('nginx', path=os.environ['PATH'] + ':/usr/sbin:/usr/local/sbin')


def nginx_config(directory, port, names):
    """A server for each language, told from the others by the Host header."""
    servers = []
    for name in names:
        place = directory / name.replace(' ', '-')
        passing = LANGUAGES[name][2].replace('%s', str(place))
        address = f'http://unix:{place}/s' if 'proxy' in passing else f'unix:{place}/s'
        servers.append(f"server {{ listen 127.0.0.1:{port}; server_name {place.name}; location / {{ "
                       f"include /etc/nginx/{'fastcgi' if 'fastcgi' in passing else 'uwsgi'}_params; "
                       f"{passing} {address}; }} }}")
    temporary = '\n'.join(f'{kind}_temp_path {directory}/{kind};' for kind in
                          ('client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'))
    return (f"{'user root;' if os.getuid() == 0 else ''} daemon off; pid {directory}/pid; worker_processes 1;"
            f"error_log {directory}/error.log; events {{ worker_connections 1000; }}"
            f"http {{ access_log off; client_max_body_size 20m; {temporary}\n" + '\n'.join(servers) + '}')


@pytest.fixture(scope='module')
def languages():
    """All of them at once: {name: Server}, each with an ask_nginx(method, path, body)."""
    import http.client
    if NGINX is None or not LANGUAGES.keys() - MISSING:
        pytest.skip('there is no nginx, or no other language')
    with tempfile.TemporaryDirectory(prefix='mu') as directory, contextlib.ExitStack() as stack:
        directory, servers, port = pathlib.Path(directory), {}, free_port()
        directory.chmod(0o755)
        for name in LANGUAGES.keys() - MISSING:
            ini, files, _, program = LANGUAGES[name]
            place = directory / name.replace(' ', '-')
            place.mkdir()
            for file, text in files.items():
                (place / file).write_text(text)
                (place / file).chmod(0o755)
            if program == 'go':
                subprocess.run(['go', 'build', '-o', 'hello', 'hello.go'], cwd=place, check=True,
                               env={'HOME': str(directory), 'GOCACHE': '/tmp/minuwsgi-go-cache', 'GOFLAGS': '-mod=mod',
                                    'GO111MODULE': 'off', **os.environ})
            (place / 'app.ini').write_text(f'[uwsgi]\nsocket = s\nprocesses = 2\ndisable-logging = true\n{ini}\n')
            servers[name] = server = Server(place, ['app.ini'])
            stack.callback(server.end)

            def ask_nginx(method='GET', path='/', body=None, host=place.name):
                connection = http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE)
                with contextlib.closing(connection):
                    connection.request(method, path, body, {'Host': host})
                    answer = connection.getresponse()
                    return answer.status, answer.read(), answer.headers
            server.ask_nginx = ask_nginx
        (directory / 'nginx.conf').write_text(nginx_config(directory, port, servers))
        nginx = subprocess.Popen([NGINX, '-c', directory / 'nginx.conf', '-p', directory], stderr=subprocess.DEVNULL)
        stack.callback(nginx.wait)
        stack.callback(nginx.terminate)
        wait_until(lambda: not socket.socket().connect_ex(('127.0.0.1', port)), 'nginx')
        for server in servers.values():
            server.ready()
        yield servers


@pytest.fixture(params=LANGUAGES)
def language(request, languages):
    if request.param in MISSING:
        pytest.skip(f'there is no {LANGUAGES[request.param][-1]}, or not its rack or Plack')
    return languages[request.param]


def test_each_language_says_hello_and_hears_the_query(language):
    status, body, _ = language.ask_nginx(path='/?name=w%C3%B6rld')
    assert status == 200 and re.fullmatch(rb'hello from \d+, you asked name=w%C3%B6rld', body)


def test_each_language_takes_bodies_of_any_size(language):
    for size in 0, 10, 100_000, 3_000_000:
        body = os.urandom(size)
        status, echo, _ = language.ask_nginx('POST', '/echo', body)
        assert status == 200 and echo == body, size


def test_each_language_has_its_404_and_its_500(language):
    assert language.ask_nginx(path='/missing')[0] == 404
    assert language.ask_nginx(path='/error')[0] == 500
    if language.directory.name in ('ruby', 'perl', 'lisp', 'lisp-as-cgi'):
        language.wait_for('oops')
    assert language.ask_nginx()[0] == 200


def test_each_language_sets_two_cookies(language):
    status, body, headers = language.ask_nginx(path='/cookies')
    assert [value.partition(';')[0] for value in headers.get_all('Set-Cookie')] == ['a=1', 'b=2'] and body == b'both'


def test_each_language_answers_HEAD_without_a_body(language):
    status, body, _ = language.ask_nginx('HEAD')
    assert (status, body) == (200, b'')
    if language.directory.name not in ('php', 'go', 'go-http'):         # nginx would hide it
        assert language.ask(REQUEST_METHOD='HEAD').body == b''


def test_each_language_gets_a_new_worker_for_a_killed_one(language):
    before = language.workers()
    os.kill(before[0], signal.SIGKILL)
    language.wait_for('died: SIGKILL')
    wait_until(lambda: len(language.workers()) == 2 and before[0] not in language.workers(), 'a new worker')
    assert language.ask_nginx()[0] == 200


@pytest.fixture(scope='module')
def reloads(languages):
    """All are reloaded at once, under load: {name: (good answers, bad answers, pids that answered)}."""
    done, results = threading.Event(), {}

    def load(name, server):
        good, bad, pids = 0, [], set()
        while not done.is_set():
            status, body, _ = server.ask_nginx()
            if status == 200 and body.startswith(b'hello from'):
                good += 1
                pids.add(body.split()[2])
            else:
                bad.append((status, body))
        results[name] = good, bad, pids
    threads = [threading.Thread(target=load, args=item) for item in languages.items() for _ in range(2)]
    for thread in threads:
        thread.start()
    old = {name: server.workers() for name, server in languages.items()}
    for server in languages.values():
        server.kill(signal.SIGHUP)
    for name, server in languages.items():
        server.wait_for('^ready', 2)
        wait_until(lambda: not set(old[name]) & set(server.workers()), 'the end of the old workers')
    done.set()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize('name', LANGUAGES)
def test_each_language_is_reloaded_without_a_failed_request(name, reloads):
    if name in MISSING:
        pytest.skip(f'there is no {LANGUAGES[name][-1]}, or not its rack or Plack')
    good, bad, pids = reloads[name]
    assert not bad and good > 5 and len(pids) >= 3


def test_a_program_that_is_not_there_or_cannot_start_ends_the_server(start):
    server = start(ini='worker-exec = /nowhere/program', ready=False)
    assert server.wait() == 22 and 'there is no program /nowhere/program' in server.log
    server = start(ini='worker-exec = sh -c "echo wont; exit 3"', ready=False)
    assert server.wait() == 22 and 'exit status 3' in server.log and 'wont' in server.lines


def test_a_program_that_ends_at_once_again_and_again_is_not_started_ever_faster(start):
    server = start(ini='worker-exec = true', ready=False)
    server.wait_for('a new one comes in 0.5 s')
    server.wait_for('a new one comes in 1 s')


ACCEPT = '''
import contextlib, os, select, socket
server = socket.socket(fileno=0)
while True:
    client, _ = server.accept()
    same = os.path.sameopenfile(0, 3)
    with client, contextlib.suppress(ConnectionError):
        client.sendall(f'{os.environ["LISTEN_FDS"]} {int(os.environ["LISTEN_PID"]) == os.getpid()} {same}'.encode())
        pass
'''


def test_a_program_finds_the_sockets_as_from_systemd_and_dies_with_the_master(start, tmp):
    (tmp / 'serve.py').write_text(ACCEPT)
    server = start(ini=f'worker-exec = {sys.executable} serve.py\nsocket = s\nsocket = t')
    with connect(server.socket) as client:
        assert read_all(client) == b'2 True True'
    worker, = server.workers()
    server.kill(signal.SIGKILL)
    wait_until(lambda: not alive(worker), 'the end of the program')


TOLD_ONCE = """
import os, select, signal, socket
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.write(1, b'told\\n')
server = socket.socket(fileno=0)
signal.signal(signal.SIGTERM, stop)
with server.accept()[0] as client, open('fifo') as fifo:
    while not select.select([fifo], [], [], 0.1)[0]: pass       # Python may miss a signal just before it waits
    client.sendall(b'done')
"""


def test_a_program_is_told_once_to_stop(start, tmp):
    """Many take a second SIGTERM for: at once."""
    os.mkfifo(tmp / 'fifo')
    (tmp / 'serve.py').write_text(TOLD_ONCE)
    server = start(ini=f'worker-exec = {sys.executable} -u serve.py')
    with connect(server.socket) as client:
        with open(tmp / 'fifo', 'w'):
            server.kill(signal.SIGTERM)
            server.wait_for('^told')
            assert not select.select([client], [], [], 0.5)[0]
        assert read_all(client) == b'done' and server.wait() == 0


def test_a_new_program_leaves_the_socket_as_the_others_need_it(start, tmp):
    """Go makes it non-blocking: a sibling would hang in accept() then, and hear no stop."""
    (tmp / 'serve.py').write_text('import os, time\nprint("blocking", os.get_blocking(0))\n'
                                  'os.set_blocking(0, False)\ntime.sleep(1000)\n')
    server = start(ini=f'worker-exec = {sys.executable} -u serve.py')
    server.wait_for('^blocking True')
    os.kill(server.workers()[0], signal.SIGKILL)
    server.wait_for('^blocking False')


def test_programs_that_hold_an_old_log_are_replaced_after_USR1(start, tmp):
    (tmp / 'serve.py').write_text(ACCEPT)
    server = start(ini=f'worker-exec = {sys.executable} serve.py\nlogto = log', ready=False)
    log = tmp / 'log'
    wait_until(lambda: 'ready: ' in server.log or log.exists() and 'ready: ' in log.read_text(), 'the start')
    if log.exists():
        log.rename(tmp / 'log.1')
    worker, = server.workers()
    server.kill(signal.SIGUSR1)
    wait_until(lambda: server.workers() and worker not in server.workers(), 'a new worker')
    assert os.path.samefile(f'/proc/{server.workers()[0]}/fd/2', log)


@pytest.mark.parametrize('option', ['max-worker-lifetime = 1', 'reload-on-rss = 1'])
def test_a_program_that_is_too_old_or_too_large_is_replaced(start, tmp, option):
    (tmp / 'serve.py').write_text(ACCEPT)
    server = start(ini=f'worker-exec = {sys.executable} serve.py\n{option}', ready=False)
    worker = server.wait_for('leaves: ' + option.partition(' ')[0]).partition('(pid ')[2].partition(')')[0]
    wait_until(lambda: int(worker) not in server.workers(), 'its end')
    assert server.workers() and 'died' not in server.log


def test_cheaper_starts_programs_when_connections_wait(start, tmp):
    (tmp / 'serve.py').write_text(ACCEPT.replace('pass', 'select.select([client], [], [])'))
    server = start(ini=f'worker-exec = {sys.executable} serve.py\nprocesses = 2\ncheaper = 1')
    assert len(server.workers()) == 1
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(server.socket))
        wait_until(lambda: len(server.workers()) == 2, 'a second worker')


@pytest.mark.parametrize('program', ['ruby', 'perl'])
def test_a_broken_application_is_not_taken_by_a_reload(start, tmp, program):
    if not is_there(program):
        pytest.skip(f'there is no {program}, or not its rack or Plack')
    option, name, text, broken = {'ruby': ('rack', 'config.ru', CONFIG_RU, 'raise "wont"'),
                                  'perl': ('psgi', 'app.psgi', APP_PSGI, 'die "wont";')}[program]
    (tmp / name).write_text(text)
    server = start(ini=f'{option} = {name}')
    assert server.ask().status == '200 OK'              # it has loaded the file
    (tmp / name).write_text(broken)
    server.kill(signal.SIGHUP)
    server.wait_for('reload: failed')
    assert 'wont' in server.log and server.ask().status == '200 OK'
    assert run(tmp, 'app.ini', '--check')[0] == 22


PING_CGI = '#!/bin/sh\necho Content-Type: text/plain\necho\n'


@pytest.fixture
def cgi(start, tmp):
    """cgi({name: text}, ini, app) starts a server with programs in the directory `bin`, made executable."""
    def cgi(programs, ini='', **options):
        for name, text in programs.items():
            file = tmp / 'bin' / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755)
        return start(options.pop('app', HELLO), f'cgi = /bin={tmp}/bin\n{ini}', **options)
    return cgi


def test_cgi_sets_the_variables_of_rfc_3875(cgi, tmp):
    server = cgi({'sub/env.cgi': PING_CGI + 'pwd; env'}, 'env = FROM_INI=yes', http=True)
    answer = server.ask('/bin/sub/env.cgi/more/w%C3%B6rld?a=b', b'12345',
                        PATH_INFO='/bin/sub/env.cgi/more/w\xc3\xb6rld', CONTENT_TYPE='text/x',
                        HTTP_PROXY='http://evil', HTTP_X_Y='z')
    lines = answer.body.decode('latin-1').split('\n')
    assert answer.header('Content-Type') == 'text/plain' and lines[0] == f'{tmp}/bin/sub'
    for line in ('GATEWAY_INTERFACE=CGI/1.1', 'SCRIPT_NAME=/bin/sub/env.cgi', 'PATH_INFO=/more/w\xc3\xb6rld',
                 f'SCRIPT_FILENAME={tmp}/bin/sub/env.cgi', 'QUERY_STRING=a=b', 'REQUEST_METHOD=POST',
                 'CONTENT_LENGTH=5', 'CONTENT_TYPE=text/x', 'PATH_TRANSLATED=/usr/share/nginx/html/more/w\xc3\xb6rld',
                 'HTTP_X_Y=z',
                 'SERVER_PROTOCOL=HTTP/1.1', 'REMOTE_ADDR=127.0.0.1', 'FROM_INI=yes', 'REDIRECT_STATUS=200'):
        assert line in lines, line
    assert not [line for line in lines if line.startswith('HTTP_PROXY') or line.startswith(('wsgi.', 'uwsgi.'))]
    lines = server.get('/bin/sub/env.cgi', 'Proxy: http://evil\r\n').text.split('\n')
    assert not [line for line in lines if line.startswith(('HTTP_PROXY', 'PATH_INFO', 'CONTENT_LENGTH', 'PATH_TR'))]


def test_cgi_heeds_status_and_location_and_complains_of_what_is_no_head(cgi):
    server = cgi({'status': '#!/bin/sh\nprintf "Status: 404\\r\\nSet-Cookie: a=1\\r\\nSet-Cookie: b=2\\r\\n\\r\\nbody"',
                  'location': '#!/bin/sh\nprintf "Location: /there\\n\\n"',
                  'garbage': '#!/bin/sh\necho no header; echo',
                  'silent': '#!/bin/sh\necho went wrong >&2; exit 3',
                  'badstatus': '#!/bin/sh\nprintf "Status: x\\n\\n"',
                  'toomuch': '#!/bin/sh\nyes "X: y"',
                  'badprogram': '#!/nowhere/program\n', 'killed': PING_CGI + 'echo part; kill -9 $$'}, http=True)
    answer = server.ask('/bin/status')
    assert answer.status == '404 Not Found' and answer.text == 'body'
    assert answer.headers == [('Set-Cookie', 'a=1'), ('Set-Cookie', 'b=2')]
    answer = server.ask('/bin/location')
    assert (answer.status, answer.header('Location')) == ('302 Found', '/there')
    assert server.ask('/bin/toomuch').status == '502 Bad Gateway'
    for name, why in (('garbage', 'in its head'), ('silent', 'without a head'), ('badstatus', "'x' is no status"),
                      ('badprogram', 'No such file')):
        answer = server.ask(f'/bin/{name}')
        assert answer.status == '502 Bad Gateway' and why in answer.text, name
    server.wait_for('^went wrong$')
    assert not server.get('/bin/killed').raw.endswith(b'0\r\n\r\n')      # it must not look complete
    server.wait_for('died: SIGKILL')


def test_cgi_never_leaves_its_directory(cgi, tmp):
    (tmp / 'secret').write_text(PING_CGI + 'echo secret')
    (tmp / 'secret').chmod(0o755)
    server = cgi({'ok': PING_CGI + 'echo ok', 'plain.txt': 'text'}, http=True, app='application = None\n' + HELLO)
    (tmp / 'bin/inside').symlink_to('ok')
    (tmp / 'bin/outside').symlink_to('../secret')
    (tmp / 'bin/plain.txt').chmod(0o644)
    assert server.ask('/bin/ok').text == 'ok\n' and server.ask('/bin/inside').text == 'ok\n'
    answer = server.ask('/bin/plain.txt')
    assert answer.status == '403 Forbidden' and 'not executable' in answer.text
    for path in ('/bin/../secret', '/bin/%2e%2e/secret', '/bin/..%2fsecret', '/bin//../secret', '/bin/ok%00',
                 '/bin/ok/../x', '/bin/outside'):
        assert server.get(path).text.endswith('hello\n'), path          # not found: so the application is asked
    assert server.ask('/binary').text == 'hello\n'


def test_cgi_mounts_extensions_and_index(cgi, tmp):
    (tmp / 'other').mkdir()
    (tmp / 'other/x.sh').write_text('echo Content-Type: text/plain; echo; echo other $SCRIPT_NAME')
    server = cgi({'x.sh': PING_CGI + 'echo bin', 'index.sh': PING_CGI + 'echo index $SCRIPT_NAME', 'no.py': PING_CGI},
                 f'cgi = /bin/deep={tmp}/other\ncgi = /one={tmp}/other/x.sh\ncgi-helper = .sh=sh -e\n'
                 'cgi-allowed-ext = .sh\ncgi-index = index.sh')
    assert server.ask('/bin/x.sh').text == 'bin\n' and server.ask('/bin/deep/x.sh').text == 'other /bin/deep/x.sh\n'
    assert server.ask('/one').text == 'other /one\n' and server.ask('/one/more').text == 'other /one\n'
    assert server.ask('/bin/').text == 'index /bin/index.sh\n'
    answer = server.ask('/bin?a=b')
    assert (answer.status, answer.header('Location')) == ('301 Moved Permanently', '/bin/?a=b')
    assert server.ask('/bin/no.py').status == '403 Forbidden' and 'cgi-allowed-ext' in server.ask('/bin/no.py').text
    assert server.ask('/bin/deep/').text == 'hello\n'


def test_cgi_without_an_application_answers_404_and_takes_modifier_9(start, tmp):
    (tmp / 'hi.sh').write_text(PING_CGI + 'cat')
    server = start(ini=f'cgi = /={tmp}\ncgi-helper = .sh=sh\nmodule =', http=True)
    assert server.ask('/nothing').status == '404 Not Found' and 'no such program' in server.ask('/nothing').text
    data = bytearray(packet('/hi.sh', b'body'))
    data[0] = 9
    assert Answer(exchange(server.socket, data)).text == 'body'
    chunked = server.get('/hi.sh', 'Transfer-Encoding: chunked\r\n', 'POST', body=b'3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n')
    assert b'abcde' in chunked.body
    body = os.urandom(3_000_000)
    assert server.ask('/hi.sh', body).body == body


@pytest.mark.parametrize('then', ['sleep 1000', 'exit'])
def test_cgi_output_is_streamed_and_its_process_group_ends_with_the_client(cgi, tmp, then):
    server = cgi({'slow': PING_CGI + f'sleep 1000 & echo $! > pid; echo first; {then}'}, http=True)
    with connect(server.socket) as client:
        client.sendall(packet('/bin/slow'))
        data = b''
        while b'first' not in data:
            data += client.recv(100)
    pid = int((tmp / 'bin/pid').read_text())
    wait_until(lambda: not alive(pid), 'the end of the program')
    server.wait_for('/bin/slow')
    assert server.ask().text == 'hello\n'


def test_cgi_that_is_silent_for_too_long_is_killed(cgi, tmp):
    server = cgi({'slow': '#!/bin/sh\necho $$ > pid; sleep 1000', 'half': PING_CGI + 'echo half; sleep 1000'},
                 'cgi-timeout = 1\nprocesses = 2', http=True)
    with connect(server.socket) as client:
        client.sendall(packet('/bin/half'))             # both wait at the same time
        answer = server.ask('/bin/slow')
        assert answer.status == '504 Gateway Timeout' and 'was silent for 1 s' in answer.text
        assert read_all(client).endswith(b'half\n')
    assert not os.path.exists(f"/proc/{(tmp / 'bin/pid').read_text().strip()}")


# ---------------------------------------------------------------------------------------------
# 9. Jobs and offload threads

class TestOffload:
    """What a client doesn't take at once costs no worker, and arrives whole."""

    @pytest.mark.parametrize('seek, length', [(0, None), (0, 30000000), (1000, 29999000), (5, 10), (0, 0), (30000000,
        0)])
    def test_a_file_is_sent_from_where_it_stands_and_as_long_as_promised(self, apps, big_file, seek, length):
        variables = {'HTTP_FILE': str(big_file), 'HTTP_SEEK': str(seek)}
        if length is not None:
            variables['HTTP_LENGTH'] = str(length)
        data = big_file.read_bytes()[seek:]
        assert apps.ask('file', **variables).body == (data if length is None else data[:length])

    def test_a_file_shorter_than_promised_is_cut_and_logged(self, apps, tmp):
        (tmp / 'f').write_bytes(b'x' * 1000)
        assert apps.ask('file', HTTP_FILE=str(tmp / 'f'), HTTP_LENGTH='2000').body == b'x' * 1000
        apps.wait_for('1000 bytes less')

    def test_a_worker_answers_beside_a_hundred_slow_readers(self, apps, big_file):
        with contextlib.ExitStack() as stack:
            slow = []
            for path in ['file', 'big'] * 50:
                connection = stack.enter_context(connect(apps.socket))
                connection.sendall(packet(path, HTTP_FILE=str(big_file)))
                slow.append(connection)
            assert apps.ask('hello').body == b'hello\n'
            data = read_all(slow[0])
            assert data.partition(b'\r\n\r\n')[2] == big_file.read_bytes()
            assert read_all(slow[1]).partition(b'\r\n\r\n')[2] == b'x' * 1000000 + b'y' * 1000000
        before = apps.ask('descriptors')
        wait_until(lambda: int(apps.ask('descriptors').body) < 30, f'few descriptors {before.text}')

    def test_jobs_finish_at_a_stop(self, start, big_file):
        server = start(APPS)
        with connect(server.socket) as slow:
            slow.sendall(packet('file', HTTP_FILE=str(big_file)))
            data = slow.recv(1000)
            server.kill(signal.SIGTERM)
            server.wait_for('stopping')
            data += read_all(slow)
        assert data.partition(b'\r\n\r\n')[2] == big_file.read_bytes()
        assert server.wait() == 0

    def test_a_stop_waits_for_a_silent_client_as_long_as_its_job_does(self, start, big_file):
        server = start(APPS, 'http-timeout = 1')
        with connect(server.socket) as silent:
            silent.sendall(packet('file', HTTP_FILE=str(big_file)))
            silent.recv(1000)
            assert server.stop() == 0

    def test_jobs_finish_at_a_reload(self, start, big_file):
        server = start(APPS)
        with connect(server.socket) as slow:
            slow.sendall(packet('file', HTTP_FILE=str(big_file)))
            data = slow.recv(1000)
            server.kill(signal.SIGHUP)
            server.wait_for('^ready', 2)
            assert server.ask('hello').body == b'hello\n'
            data += read_all(slow)
        assert data.partition(b'\r\n\r\n')[2] == big_file.read_bytes()


# ---------------------------------------------------------------------------------------------
# 10. to 15. Serving, worker, loading, statistics, master, command line

SLOW = APPS + """
def slow(e, s):
    fifo = e['QUERY_STRING']
    s('200 OK', [])
    return [open(fifo, 'rb').read() + b' by %d' % os.getpid()]
def spin(e, s):
    while True: pass
def deaf(e, s):
    while True:
        try:
            import time; time.sleep(100)
        except BaseException: pass
def crash(e, s):
    os.kill(os.getpid(), int(e['QUERY_STRING']))
def leave(e, s):
    os._exit(7)
def close_all(e, s):
    os.closerange(3, 20); return hello(e, s)
def eat(e, s):
    globals().setdefault('eaten', []).append(b'x' * 30000000); return hello(e, s)
"""


class Held:
    """A request that runs until release() is called: the application reads from a fifo."""

    def __init__(self, server, tmp, name='fifo'):
        self.fifo = tmp / name
        os.mkfifo(self.fifo)
        self.connection = connect(server.socket)
        self.connection.sendall(packet('slow', QUERY_STRING=str(self.fifo)))
        self.writer = open(self.fifo, 'wb')             # waits until the application has opened it

    def release(self):
        self.writer.write(b'done')
        self.writer.close()
        with self.connection:
            return Answer(read_all(self.connection))


class Load:
    """Clients that ask all the time, each on new connections; failures are what didn't go as it should.

    visit(random numbers) may do something else than to ask for a path: it returns what went wrong, or None."""

    def __init__(self, server, path='hello', clients=4, visit=None):
        self.server, self.path, self.answered, self.failures, self.bodies = server, path, 0, [], set()
        self.running, self.visit = True, visit
        self.threads = [threading.Thread(target=self.visits if visit else self.ask, args=(i,) if visit else (),
                                         daemon=True) for i in range(clients)]
        for thread in self.threads:
            thread.start()

    def ask(self):
        while self.running:
            try:
                answer = self.server.ask(self.path)
            except OSError as error:
                self.failures.append(repr(error))
            else:
                self.answered += 1
                self.bodies.add(answer.body)
                if answer.status != '200 OK':
                    self.failures.append(answer.raw)

    def visits(self, seed):
        """failures has (begin, end, what went wrong) then."""
        chance = random.Random(seed)
        while self.running:
            began = time.monotonic()
            try:
                wrong = self.visit(chance)
            except (OSError, http.client.HTTPException) as error:
                wrong = repr(error)
            self.answered += 1
            if wrong:
                self.failures.append((began, time.monotonic(), wrong))

    def more(self, requests):
        """Wait for so many more answers; on a busy machine that may take long, if only they come."""
        goal = self.answered + requests
        while (before := self.answered) < goal and (self.visit or not self.failures):
            wait_until(lambda: self.answered > before or self.failures and not self.visit, 'one more answer')

    def end(self):
        self.running = False
        for thread in self.threads:
            thread.join(PATIENCE)
        return self.failures


def kill_a_worker(server, number):
    """With SIGKILL, one after the other; returns when the master has noticed it as often."""
    victims = wait_until(server.workers, 'a worker')
    with contextlib.suppress(ProcessLookupError):
        os.kill(victims[number % len(victims)], signal.SIGKILL)
    server.wait_for('died', number + 1)


class TestProcesses:
    """A worker that ends is replaced, with a line that says why; the others don't notice."""

    def test_the_application_is_loaded_once_and_the_workers_share_it(self, start):
        server = start('import os\nloaded_in = os.getpid()\n' + APPS.replace("b'%d' % os.getpid()",
            "b'%d' % loaded_in"),
                       'processes = 3')
        assert len(server.workers()) == 3
        assert server.ask('pid').body == b'%d' % server.pid

    def test_lazy_apps_are_loaded_in_each_worker(self, start):
        server = start('import os\nloaded_in = os.getpid()\n' + APPS.replace("b'%d' % os.getpid()",
            "b'%d' % loaded_in"),
                       'processes = 2\nlazy-apps = true')
        assert int(server.ask('pid').body) in server.workers()

    @pytest.mark.parametrize('path, query, words', [
        ('crash', str(int(signal.SIGKILL)), 'SIGKILL, not sent by us, at GET crash'),
        ('crash', str(int(signal.SIGSEGV)), 'SIGSEGV, at GET crash'),
        ('crash', str(int(signal.SIGABRT)), 'SIGABRT'), ('crash', '40', 'signal 40, at'),
        ('leave', '', 'exit status 7, at GET leave')])
    def test_a_worker_that_dies_is_replaced_and_its_request_named(self, start, path, query, words):
        server = start(SLOW)
        before = server.workers()
        assert server.ask(path, QUERY_STRING=query).raw == b''
        line = server.wait_for('died')
        assert words in line and 'peak rss' in line and f'pid {before[0]}' in line
        assert server.ask('hello').body == b'hello\n'
        assert server.workers() != before

    def test_fifty_kills_under_load_lose_only_the_requests_at_hand(self, start):
        server = start(SLOW, 'processes = 2\ndisable-logging = true')
        load = Load(server)
        for i in range(50):
            load.more(5) if not load.failures else None
            kill_a_worker(server, i)
            load.failures[:], lost = [], len(load.failures)
            assert lost <= 2
        load.more(20)
        load.end()

    def test_an_idle_death_is_followed_by_a_pause_that_grows(self, start):
        server = start()
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_for('a new one comes in 0.5 s')
        assert server.ask().body == b'hello\n'

    def test_an_application_that_cannot_be_loaded_ends_the_start(self, tmp):
        (tmp / 'bad.py').write_text('import nothing_of_that_name')
        for lazy in (), ('--lazy-apps',):
            code, output = run(tmp, '--socket', 's', '--vacuum', '--module', 'bad', *lazy)
            assert code == 22 and "No module named 'nothing_of_that_name'" in output
        assert not (tmp / 's').exists()

    @pytest.mark.parametrize('arguments, words', [
        (['--module', 'nowhere'], "there is no module 'nowhere'"), (['--module', 'os:nothing'], "os has no 'nothing'"),
        (['--wsgi-file', 'none.py'], 'there is no file'), ([], 'no application is named'),
        (['--module', 'minuwsgi'], "minuwsgi has no 'application'")])
    def test_a_missing_application_is_told_in_words(self, tmp, arguments, words):
        code, output = run(tmp, '--socket', 's', *arguments)
        assert code == 22 and words in output and 'Traceback' not in output

    def test_without_a_master_one_process_serves(self, start):
        server = start(APPS, 'master = false')
        assert int(server.ask('pid').body) == server.pid and server.workers() == []
        assert server.stop() == 0

    def test_without_a_master_ctrl_c_serves_those_who_wait(self, start, tmp):
        server = start(SLOW, 'master = false')
        held = Held(server, tmp)
        with connect(server.socket) as waiting:
            waiting.sendall(packet('hello'))
            server.kill(signal.SIGINT)
            server.wait_for('stopping')
            assert held.release().body.startswith(b'done') and Answer(read_all(waiting)).body == b'hello\n'
        assert server.wait() == 0

    @pytest.mark.parametrize('mercy, signals', [(60, 2), (1, 1)])
    def test_without_a_master_a_second_signal_or_the_mercy_ends_what_hangs(self, start, tmp, mercy, signals):
        server = start(SLOW, f'master = false\nvacuum = true\nworker-reload-mercy = {mercy}')
        held = Held(server, tmp)
        server.kill(signal.SIGTERM)
        server.wait_for('stopping')
        select.select([], [], [], 0.6 * (signals - 1))
        if signals > 1:
            server.kill(signal.SIGINT)
        assert server.wait_for('at once') and server.wait() == 0 and not os.path.exists(server.socket)
        held.connection.close()
        held.writer.close()

    def test_without_a_master_a_signal_before_it_serves_stops_it(self, start):
        server = start('''
            import os, signal, uwsgidecorators
            uwsgidecorators.postfork(lambda: os.kill(os.getpid(), signal.SIGINT))
            ''' + textwrap.indent(HELLO, ' ' * 12), 'master = false', ready=False)
        assert server.wait() == 0 and 'stopping' in server.log

    def test_threads_serve_at_the_same_time(self, start, tmp):
        server = start(SLOW, 'threads = 3')
        held = [Held(server, tmp, f'fifo{i}') for i in range(2)]
        assert server.ask('hello').body == b'hello\n'
        assert eval(server.ask('environ').body)['wsgi.multithread'] == 'True'
        assert len({answer.release().body for answer in held}) == 1

    @pytest.mark.parametrize('ini', ['http-socket = 127.0.0.1:{}', 'threads = 2\nhttp-socket = 127.0.0.1:{}'])
    def test_after_kill_9_of_the_master_the_next_one_can_start(self, start, tmp, ini):
        """Though a worker of the first is still at a request; and it serves who had begun."""
        port = free_port()
        ini = ini.format(port)
        server = start(SLOW, f'{ini}\nsocket = s')
        with connect(('127.0.0.1', port)) as begun, connect(('127.0.0.1', port)) as waiting:
            begun.sendall(b'GET /hello HTTP/1.1\r\n')
            select.select([], [], [], 0.2)              # it is accepted meanwhile
            held = Held(server, tmp)
            waiting.sendall(b'GET /hello HTTP/1.0\r\n\r\n')
            (worker,) = server.workers()
            server.kill(signal.SIGKILL)
            server.process.wait()
            assert start(SLOW, f'{ini}\nsocket = t').wait_for('^ready')
            assert alive(worker) and held.release().body.startswith(b'done')
            begun.sendall(b'Host: x\r\nConnection: close\r\n\r\n')
            assert Answer(read_all(begun)).body == b'hello\n'
        wait_until(lambda: not alive(worker), 'its end')

    def test_kill_9_of_the_master_ends_the_workers_at_once(self, start, tmp):
        server = start(SLOW, 'processes = 3')
        workers = server.workers()
        held = Held(server, tmp)
        server.kill(signal.SIGKILL)
        server.process.wait(PATIENCE)
        wait_until(lambda: sum(alive(pid) for pid in workers) == 1, 'the end of the idle workers')
        assert held.release().body.startswith(b'done by')
        wait_until(lambda: not any(alive(pid) for pid in workers), 'the end of the last worker')

    @pytest.mark.parametrize('ini', ['', 'threads = 2', 'harakiri = 100'])
    def test_after_kill_9_of_the_master_a_worker_has_worker_reload_mercy(self, start, tmp, ini):
        server = start(SLOW, f'worker-reload-mercy = 1\n{ini}')
        held = Held(server, tmp)
        (worker,) = server.workers()
        server.kill(signal.SIGKILL)
        server.process.wait(PATIENCE)
        wait_until(lambda: not alive(worker), 'its end')
        held.writer.close()
        held.connection.close()

    def test_old_workers_that_are_killed_during_a_reload_are_no_failures(self, start, tmp):
        """And the server is ready when all are there."""
        os.mkfifo(tmp / 'fifo')
        server = start("import os\nif os.path.exists('again'): open('fifo').read()\n" + HELLO,
                       'lazy-apps = true\nprocesses = 2')
        old = server.workers()
        (tmp / 'again').touch()

        def let_go():
            with contextlib.suppress(OSError):          # nobody waits for it
                os.close(os.open(tmp / 'fifo', os.O_WRONLY | os.O_NONBLOCK))
            return True
        server.kill(signal.SIGHUP)
        wait_until(lambda: let_go() and 'reloaded' in server.log, 'the new image')
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.log.count(' died: SIGKILL') == 2, 'the news')
        (tmp / 'again').unlink()
        wait_until(lambda: let_go() and server.log.count('ready: 2 workers') == 2, 'two new workers')
        assert 'a new one comes' not in server.log and server.log.count('ready:') == 2

    def test_what_the_application_starts_inherits_nothing(self, start):
        server = start("""
            import subprocess
            def application(e, s):
                s('200 OK', [])
                return [subprocess.run(['ls', '-l', '/proc/self/fd'], capture_output=True, close_fds=False).stdout]
            """, 'processes = 2', http=True)
        listing = server.ask().text
        assert listing.count('->') <= 4 and 'socket' not in listing

    def test_an_application_that_closes_our_descriptors_is_survived(self, start):
        server = start(SLOW, 'processes = 2')
        server.tracebacks_expected = True
        for _ in range(3):
            server.ask('close_all')
        wait_until(lambda: server.ask('hello').body == b'hello\n', 'an answer')

    def test_as_pid_1_strangers_are_buried(self, start, tmp):
        if subprocess.call(['unshare', '--pid', '--fork', '--mount-proc', 'true'], stderr=subprocess.DEVNULL):
            pytest.skip('unshare of util-linux, as root, does not work')
        (tmp / 'app.py').write_text(
            HELLO + 'import os\nif not os.fork():\n    if os.fork(): os._exit(0)\n    os._exit(0)\n')
        process = subprocess.Popen(['unshare', '--pid', '--fork', '--kill-child', '--mount-proc', sys.executable,
                                    str(MINUWSGI), '--socket', 's', '--module', 'app'], cwd=tmp, stderr=subprocess.PIPE)
        try:
            for line in process.stderr:
                if line.startswith(b'ready'):
                    break
            assert ask(str(tmp / 's')).body == b'hello\n'
            inside = children(process.pid)[0]
            os.kill(inside, signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


class TestHotPath:
    """What a request costs."""

    @pytest.mark.skipif(not shutil.which('strace'), reason='strace is not there')
    @pytest.mark.parametrize('app', [HELLO, HELLO.replace(", ('Content-Length', '6')", '')], ids=['length', 'none'])
    def test_a_small_request_takes_four_system_calls(self, start, tmp, app):
        server = start(app, 'disable-logging = true')
        for _ in range(3):                              # it learns what the packets look like
            server.ask()
        worker, = server.workers()
        strace = subprocess.Popen(['strace', '-p', str(worker), '-o', str(tmp / 'trace')], stderr=subprocess.PIPE)
        try:
            assert b'attached' in strace.stderr.readline()
            os.kill(worker, signal.SIGSTOP)             # so that all of it is there when it accepts
            waiting = [connect(server.socket) for _ in range(10)]
            for connection in waiting:
                connection.sendall(packet())
            os.kill(worker, signal.SIGCONT)
            for connection in waiting:
                with connection:
                    assert Answer(read_all(connection)).body == b'hello\n'
        finally:
            strace.terminate()
            strace.wait()
            strace.stderr.close()
        calls = re.findall(r'^(\w+)\(', (tmp / 'trace').read_text(), re.M)
        calls = calls[calls.index('close') + 1:]        # behind the request that was the first to be seen
        assert calls[:36] == ['accept4', 'preadv2', 'write', 'close'] * 9


    @pytest.mark.parametrize('option', ['socket = s', 'http-socket = s'])
    def test_a_connection_wakes_one_worker_and_not_all(self, start, option):
        server = start(ini=f'processes = 4\ndisable-logging = true\n{option}')
        before = sum(map(slept, server.workers()))
        request = packet() if option == 'socket = s' else b'GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'
        for _ in range(300):
            assert Answer(exchange(server.socket, request)).body == b'hello\n'
        assert sum(map(slept, server.workers())) - before < 800         # twice each, if it has to wait for the bytes


def slept(pid):
    """How often a process has gone to sleep, and so was woken."""
    status = pathlib.Path(f'/proc/{pid}/status').read_text()
    return int(re.search(r'^voluntary_ctxt_switches:\s*(\d+)', status, re.M)[1])


class TestForks:
    """What an application forks while it is loaded is no server."""

    CHILD = """
        import os, signal, time
        pid = os.fork()
        if not pid:
            time.sleep(1000)
            os._exit(0)
        open('pids', 'a').write(f'{pid} ')
        """

    @pytest.mark.parametrize('ini', ['', 'lazy-apps = true'])
    def test_a_signal_for_it_is_none_for_the_server(self, start, tmp, ini):
        server = start(textwrap.dedent(self.CHILD) + HELLO, ini)
        pid = int((tmp / 'pids').read_text())
        for number in signal.SIGHUP, signal.SIGTERM:
            with contextlib.suppress(ProcessLookupError):       # the first may have ended it
                os.kill(pid, number)
        wait_until(lambda: not alive(pid), 'its end')
        assert server.ask().body == b'hello\n' and 'stopping' not in server.log and 'reload' not in server.log

    def test_it_can_be_ended_while_the_application_is_loaded(self, start):
        server = start(textwrap.dedent(self.CHILD) + 'os.kill(pid, signal.SIGTERM)\n'
                       'ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n' + HELLO.replace('hello', '%d'))
        assert server.ask().body == b'%d\n'

    @pytest.mark.parametrize('end', ['sys.exit()', 'pass'])
    def test_one_that_comes_back_from_the_import_removes_nothing(self, start, end):
        server = start(f'import os, sys\nif not os.fork(): {end}\nelse: os.wait()\n' + HELLO, 'vacuum = true')
        assert server.ask().body == b'hello\n'
        assert 'came back from the import' in server.log and server.log.count('ready') == 1
        server.tracebacks_expected = True

    def test_one_that_is_interrupted_removes_nothing(self, start, tmp):
        server = start('import os, time\npid = os.fork()\nwhile not pid: time.sleep(1)\n' + HELLO
                       + 'open("pid", "w").write(str(pid))\n', 'vacuum = true\npidfile = p')
        server.tracebacks_expected = True
        pid = int((tmp / 'pid').read_text())
        os.kill(pid, signal.SIGINT)
        wait_until(lambda: not alive(pid), 'its end')
        assert server.ask().body == b'hello\n' and (tmp / 'p').exists()

    def test_it_does_not_keep_the_sockets(self, start, tmp):
        server = start(textwrap.dedent(self.CHILD) + HELLO, 'pidfile = p', http=True)
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        pids = [int(pid) for pid in (tmp / 'pids').read_text().split()]
        try:
            server.kill(signal.SIGTERM)
            assert server.process.wait(PATIENCE) == 0 and len(pids) == 3 and all(map(alive, pids))
            server = start(HELLO, f'pidfile = p\nsocket = s\nhttp-socket = 127.0.0.1:{server.http[1]}')
            assert server.ask().body == b'hello\n'
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)


    def test_one_keeps_no_client_of_a_response_that_is_just_being_offloaded(self, start):
        server = start('''
            import os, time
            def application(e, s):
                s('200 OK', [])
                if e['PATH_INFO'] == '/large':
                    return [bytes(65536)] * 100
                return [str(os.fork() or time.sleep(1000)).encode()]
            ''', http=True)

        def sockets(pid):
            for fd in os.listdir(f'/proc/{pid}/fd'):
                with contextlib.suppress(FileNotFoundError):            # it has just let go of that
                    if os.readlink(f'/proc/{pid}/fd/{fd}').startswith('socket:'):
                        yield fd
        for _ in range(20):                             # seen in a third of them
            with Kept(server) as reader, Kept(server) as other:
                reader.send('GET /large HTTP/1.1', 'Host: x')
                pid = int(other.get('/fork').body)
                wait_until(lambda: not list(sockets(pid)), 'letting go')
                os.kill(pid, signal.SIGKILL)

    def test_one_that_is_made_during_a_stop_keeps_no_client(self, start, tmp):
        server = start('''
            import os, time
            def application(e, s):
                open(e['QUERY_STRING']).read()
                pid = os.fork()
                if not pid:
                    time.sleep(1000)
                s('200 OK', [])
                return [str(pid).encode()]
            ''')
        held = Held(server, tmp)
        server.kill(signal.SIGHUP)                      # the old worker is told to stop when the new one is ready
        server.wait_for('^ready', 2)
        os.kill(int(held.release().body), signal.SIGKILL)

    def test_one_keeps_no_client_though_no_descriptor_is_left(self, start):
        server = start('''
            import os, time
            held = []
            def application(e, s):
                try:
                    while True: held.append(os.open('/dev/null', 0))
                except OSError: pid = os.fork()
                if not pid:
                    time.sleep(1000)
                while held: os.close(held.pop())
                s('200 OK', [])
                return [str(pid).encode()]
            ''', 'max-fd = 100')
        os.kill(int(server.ask().body), signal.SIGTERM)

    def test_one_leaves_the_sockets_of_the_application_as_they_are(self, start):
        server = start('''
            import os, socket
            socket.setdefaulttimeout(10)
            a, b = socket.socketpair()
            for one in a, b: os.set_blocking(one.fileno(), True)
            def application(e, s):
                pid = os.fork()
                if not pid:
                    b.sendall(str(socket.getdefaulttimeout()).encode())
                    os._exit(0)
                os.waitpid(pid, 0)
                s('200 OK', [])
                return [a.recv(100), str(os.get_blocking(a.fileno())).encode()]
            ''')
        assert server.ask().body == b'10.0True'

    def test_one_of_a_thread_keeps_no_client_of_another_that_sends_slowly(self, start, tmp):
        server = start("""
            import os, time
            def application(e, s):
                pid = os.fork() if e['PATH_INFO'] == '/fork' else 0
                if not pid and e['PATH_INFO'] == '/fork':
                    time.sleep(1000)
                s('200 OK', [])
                return [str(pid).encode()]
            """, 'threads = 2')
        with connect(server.socket) as slow:
            slow.sendall(packet()[:10])
            pid = int(server.ask('/fork').body)
            try:
                slow.sendall(packet()[10:])
                assert Answer(read_all(slow)).body == b'0'
            finally:
                os.kill(pid, signal.SIGKILL)


class TestStop:
    """A stop loses nothing that was accepted or waits, and says what it waits for."""

    @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
    def test_the_request_at_hand_is_finished(self, start, tmp, number):
        server = start(SLOW, 'vacuum = true')
        held = Held(server, tmp)
        server.kill(number)
        assert 'worker 1 busy with GET slow' in server.wait_for('stopping')
        assert held.release().body.startswith(b'done')
        assert server.wait() == 0 and not os.path.exists(server.socket)

    @pytest.mark.parametrize('ini', ['', 'socket = s\nsocket = t', 'threads = 2', 'socket = s\nhttp-socket = t'])
    def test_those_who_wait_in_the_queue_are_served(self, start, tmp, ini):
        server = start(SLOW, ini)
        if 'threads' in ini:
            other = Held(server, tmp, 'fifo2')
        held = Held(server, tmp)
        waiting = [connect(server.socket) for _ in range(5)]
        for connection in waiting:
            connection.sendall(packet('hello'))
        server.kill(signal.SIGTERM)
        server.wait_for('stopping')
        held.release()
        if 'threads' in ini:
            other.release()
        for connection in waiting:
            with connection:
                assert Answer(read_all(connection)).body == b'hello\n'
        assert server.wait() == 0

    @pytest.mark.parametrize('numbers', [(signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,
        signal.SIGTERM)])
    def test_quit_or_a_second_signal_stops_at_once(self, start, tmp, numbers):
        server = start(SLOW, 'vacuum = true')
        held = Held(server, tmp)
        server.kill(numbers[0])
        server.wait_for('stopping')
        wait_until(lambda: server.kill(numbers[-1]) or 'stopping at once' in server.log, 'the second one')
        assert server.wait() == 0 and not os.path.exists(server.socket)
        held.writer.close()
        held.connection.close()

    def test_a_process_and_its_group_are_told_by_timeout_and_the_request_is_finished(self, start, tmp):
        server = start(SLOW)
        held = Held(server, tmp)
        server.kill(signal.SIGTERM)
        server.kill(signal.SIGINT)
        server.kill(signal.SIGTERM)
        server.wait_for('stopping')
        select.select([], [], [], 0.2)                  # the others come meanwhile
        assert held.release().body.startswith(b'done')
        assert server.wait() == 0

    @pytest.mark.parametrize('ini', ['', 'threads = 2', 'http-socket = s'])
    def test_a_stop_ends_though_requests_keep_coming(self, start, ini):
        server = start('import time\n' + HELLO.replace("return", "time.sleep(0.02); return"), ini)
        request = b'GET / HTTP/1.0\r\n\r\n' if 'http' in ini else packet()
        ended = threading.Event()

        def ask_again_and_again():
            with contextlib.suppress(OSError):          # at the end nobody listens
                while not ended.is_set():
                    exchange(server.socket, request)
        clients = [threading.Thread(target=ask_again_and_again) for _ in range(6)]
        for client in clients:
            client.start()
        server.kill(signal.SIGTERM)
        assert server.wait() == 0
        ended.set()
        for client in clients:
            client.join()

    def test_without_a_master_the_end_is_that_of_any_program(self, start, tmp):
        server = start('file = open("buffered", "w")\nfile.write("this")\n' + HELLO, 'master = false')
        assert server.stop() == 0 and ((tmp / 'buffered').read_text() == 'this' or sys.version_info < (3, 10))
        server = start(HELLO, 'master = false', program=('-m', 'cProfile', '-o', 'profile', str(MINUWSGI)))
        assert server.stop() == 0 and (tmp / 'profile').stat().st_size

    def test_at_once_waits_for_no_thread_of_the_application(self, start):
        server = start('import threading\nthreading.Thread(target=threading.Event().wait).start()\n' + HELLO)
        server.kill(signal.SIGQUIT)
        assert server.wait() == 0

    @pytest.mark.parametrize('ini', ['', 'processes = 2', 'http', 'http\nprocesses = 2', 'threads = 2'])
    def test_who_comes_later_is_refused_and_can_ask_another_server(self, start, tmp, ini):
        port = free_port()
        server = start(SLOW, f'vacuum = true\n{ini}'.replace('http', f'socket = s\nhttp-socket = 127.0.0.1:{port}'))
        held = Held(server, tmp)
        server.kill(signal.SIGTERM)
        server.wait_for('stopping')
        with pytest.raises(ConnectionRefusedError):
            connect(('127.0.0.1', port) if 'http' in ini else server.socket)
        assert held.release().body.startswith(b'done')
        assert server.wait() == 0 and not os.path.exists(server.socket)

    def test_a_worker_that_dies_at_a_stop_leaves_those_who_wait_to_the_other(self, start, tmp):
        port = free_port()
        server = start(SLOW, f'processes = 2\nsocket = s\nsocket = 127.0.0.1:{port}')
        held = [Held(server, tmp, f'fifo{i}') for i in range(2)]
        with connect(('127.0.0.1', port)) as waiting:
            waiting.sendall(packet('hello'))
            server.kill(signal.SIGTERM)
            server.wait_for('stopping')
            os.kill(server.workers()[0], signal.SIGKILL)
            wait_until(lambda: len(server.workers()) == 1, 'its end')
            assert not select.select([waiting], [], [], 0.2)[0]         # else it is reset
            for one in held:
                with contextlib.suppress(OSError):
                    one.release()
            assert Answer(read_all(waiting)).body == b'hello\n'
        assert server.wait() == 0

    def test_a_request_without_end_is_killed_after_the_mercy(self, start):
        server = start(SLOW, 'worker-reload-mercy = 1')
        with connect(server.socket) as connection:
            connection.sendall(packet('deaf'))
            wait_until(lambda: 'S' in pathlib.Path(f'/proc/{server.workers()[0]}/stat').read_text().split()[2], 'sleep')
            server.kill(signal.SIGTERM)
            assert 'had 1 s to finish' in server.wait_for('is killed')
        assert server.wait() == 0

    @pytest.mark.parametrize('numbers', [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)])
    def test_term_during_the_import_stops(self, start, tmp, numbers):
        os.mkfifo(tmp / 'fifo')
        server = start('import select\nfifo = open("fifo")\nwhile not select.select([fifo], [], [], 0.1)[0]: pass\n'
                       + HELLO, 'vacuum = true', ready=False)
        with open(tmp / 'fifo', 'w'):
            for number in numbers:
                server.kill(number)
            assert server.wait() == 0
        assert 'stopped while starting' in server.log and not os.path.exists(server.socket)

    @pytest.mark.parametrize('ini', ['', 'socket = s\nsocket = t', 'http-socket = s', 'threads = 2'])
    def test_term_while_a_worker_loads_serves_those_who_wait(self, start, tmp, ini):
        os.mkfifo(tmp / 'fifo')
        server = start('open("fifo").read()\n' + HELLO, f'lazy-apps = true\n{ini}', ready=False)
        with open(tmp / 'fifo', 'w'):
            connection = connect(server.socket)
            connection.sendall(b'GET / HTTP/1.0\r\n\r\n' if 'http' in ini else packet())
            server.kill(signal.SIGTERM)
            server.wait_for('stopping')
            select.select([], [], [], 0.3)              # the worker hears it meanwhile
        with connection:
            assert Answer(read_all(connection)).body == b'hello\n'
        assert server.wait() == 0

    def test_atexit_and_other_threads_get_their_time(self, start, tmp):
        os.mkfifo(tmp / 'fifo')
        server = start(HELLO + """
import atexit, os, threading
atexit.register(lambda: open('atexit', 'w').write('done'))
def linger():
    open('fifo').read()
    open('thread', 'w').write('done')
os.register_at_fork(after_in_child=lambda: threading.Thread(target=linger).start())
""")
        server.kill(signal.SIGTERM)
        server.wait_for('stopping')
        with open(tmp / 'fifo', 'w'):
            pass
        assert server.wait() == 0
        assert (tmp / 'thread').read_text() == (tmp / 'atexit').read_text() == 'done'

    @pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGQUIT])
    def test_a_signal_at_pythons_own_end_leaves_the_exit_code(self, start, tmp, number):
        os.mkfifo(tmp / 'fifo')
        server = start(HELLO + """
import os, sys
class Last:
    def __del__(self, open=os.open, read=os.read, pid=os.getpid, master=os.getpid()):
        if pid() == master:
            read(open('fifo', 0), 1)
sys.last = Last()
""")
        server.kill(signal.SIGTERM)
        with open(tmp / 'fifo', 'w'):                   # its end deletes what modules hold
            server.kill(number)
        assert server.wait() == 0

    def test_stop_and_reload_by_pidfile(self, start, tmp):
        server = start(ini='pidfile = p')
        assert run(tmp, '--reload', 'p') == (0, '')
        server.wait_for('^ready', 2)
        assert run(tmp, 'app.ini', '--socket', 't')[0] == 1          # the pidfile is locked
        assert run(tmp, '--stop', 'p') == (0, '')
        assert server.wait() == 0
        code, output = run(tmp, '--stop', 'p')
        assert code == 1 and 'does not run any more' in output
        assert run(tmp, '--stop', 'nothing')[0] == 1

    def test_die_on_term_false_reloads(self, start):
        server = start(ini='die-on-term = false')
        server.kill(signal.SIGTERM)
        server.wait_for('^ready', 2)
        assert server.stop(signal.SIGINT) == 0


WAITS_FOR_ALL = HELLO + """
import os, threading
def wait_for_all():
    while True:
        try: os.wait()
        except ChildProcessError: threading.Event().wait(0.01)
threading.Thread(target=wait_for_all, daemon=True).start()
"""


class TestReload:
    """A reload brings the new code and configuration, and nobody waits for it or is lost."""

    def test_a_server_that_was_started_with_m_is_reloaded_with_m(self, start, tmp):
        server = start(APPS, 'chdir2 = /', program=('-O', '-m', 'minuwsgi'),
                       environment={'PYTHONPATH': f'{HERE}:{tmp}'})
        for reloads in 0, 1:
            command = pathlib.Path(f'/proc/{server.pid}/cmdline').read_bytes().split(b'\0')
            assert command[1:5] == [b'-O', b'-m', b'minuwsgi', b'app.ini'] or sys.version_info < (3, 10) and \
                command[1:4] == [b'-m', b'minuwsgi', b'app.ini'] and reloads
            assert server.ask('hello').status == '200 OK'
            server.kill(signal.SIGHUP)
            server.wait_for('^ready', reloads + 2)

    def test_a_worker_that_goes_leaves_nobody_waiting(self, start):
        """Of a connection the kernel tells one worker alone; if that one goes, perhaps none comes to wake the next."""
        server = start(ini='disable-logging = true\nmax-requests = 30\nthreads = 2')
        while len(server.lines) < 50:                   # of workers that leave
            assert server.ask().body == b'hello\n'

    @pytest.mark.parametrize('ini', ['processes = 2', 'processes = 2\nlazy-apps = true', 'processes = 2\nthreads = 3'])
    def test_reloads_under_load_lose_no_request(self, start, tmp, ini):
        server = start(APPS, ini + '\ndisable-logging = true')
        load = Load(server)
        for i in range(4):
            load.more(50)
            (tmp / 'app.py').write_text(APPS.replace("b'hello", f"b'hell{i}").replace("'6'", "'6'"))
            server.kill(signal.SIGHUP)
            server.wait_for('^ready', i + 2)
        load.more(50)
        assert load.end() == []
        assert b'hell3\n' in load.bodies and server.ask('hello').body == b'hell3\n'

    def test_the_pid_stays_and_new_options_count(self, start, tmp):
        server = start(ini='processes = 1')
        (tmp / 'app.ini').write_text('[uwsgi]\nmodule = app\nsocket = s\nsocket = t\nprocesses = 3\n')
        server.kill(signal.SIGHUP)
        server.wait_for('ready: 3 workers')
        wait_until(lambda: len(server.workers()) == 3, 'three workers')
        assert ask(str(tmp / 't')).body == b'hello\n'
        (tmp / 'app.ini').write_text('[uwsgi]\nmodule = app\nsocket = t\nvacuum = true\n')
        server.kill(signal.SIGHUP)
        server.wait_for('ready: 1 worker', 2)
        assert ask(str(tmp / 't')).body == b'hello\n' and not os.path.exists(server.socket)

    @pytest.mark.parametrize('file, text, words', [
        ('app.py', 'def application(', 'SyntaxError'), ('app.py', 'import nothing_there', 'nothing_there'),
        ('app.ini', '[uwsgi]\nsocket = s\nmodule = app\nprocesses = many\n', 'a whole number'),
        ('app.ini', '[uwsgi]\nsocket = s\nmodule = app\nchdir = /nowhere\n', '/nowhere')])
    def test_a_broken_reload_leaves_the_old_code_serving(self, start, tmp, file, text, words):
        server = start()
        server.tracebacks_expected = True
        workers = server.workers()
        good = (tmp / file).read_text()
        (tmp / file).write_text(text)
        server.kill(signal.SIGHUP)
        server.wait_for('the old code goes on serving')
        assert words in server.log and server.ask().body == b'hello\n' and server.workers() == workers
        (tmp / file).write_text(good)
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask().body == b'hello\n'

    def test_code_that_hangs_is_given_up_for_newer_code(self, start, tmp):
        os.mkfifo(tmp / 'fifo')
        server = start(ini='worker-reload-mercy = 1')
        (tmp / 'app.py').write_text('open("fifo").read()\n' + HELLO)
        server.kill(signal.SIGHUP)
        with open(tmp / 'fifo', 'w'):                   # it hangs there
            (tmp / 'app.py').write_text(HELLO.replace('hello', 'newer'))
            server.kill(signal.SIGHUP)
            server.wait_for('is given up for newer code')
        server.wait_for('^ready', 2)
        wait_until(lambda: len(server.workers()) == 1, 'the end of the old worker')
        assert server.ask().body == b'newer\n'

    @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGQUIT])
    def test_a_stop_is_heard_while_the_reloaded_code_loads(self, start, tmp, number):
        os.mkfifo(tmp / 'fifo')
        server = start('open("loads", "a").write("x")\nif len(open("loads").read()) == 3:\n    open("fifo").read()\n'
                       + HELLO, 'vacuum = true')
        server.kill(signal.SIGHUP)
        server.wait_for('reloaded$')
        wait_until(lambda: len((tmp / 'loads').read_text()) == 3, 'the third time')
        server.kill(number)
        assert server.wait() == 0 and 'reload: failed' not in server.log and not os.path.exists(server.socket)

    def test_a_server_without_workers_that_can_start_none_ends(self, start, tmp):
        server = start(ini='socket = s')
        with socket.socket() as other:
            other.bind(('127.0.0.1', 0))
            other.listen()
            (tmp / 'app.ini').write_text('[uwsgi]\nmodule = app\nsocket = s\nhttp-socket = 127.0.0.1:%d\n'
                                         % other.getsockname()[1])
            server.kill(signal.SIGHUP)
            server.wait_for('the old workers go on serving')
            os.kill(server.workers()[0], signal.SIGSEGV)
            assert server.wait() == 1 and 'no worker is left' in server.log

    def test_an_address_may_be_written_in_another_way_or_get_another_protocol(self, start, tmp):
        port, other = free_port(), free_port()
        server = start(ini=f'socket = s\nsocket = :{port}\nsocket = localhost:{other}')
        request = b'GET / HTTP/1.0\r\n\r\n'
        for i, (ini, path, tcp) in enumerate([
                (f'http-socket = {tmp}/s\nsocket = 0.0.0.0:{port}\nhttp-socket = localhost:{other}', request, packet()),
                (f'socket = s\nvacuum = true\nhttp-socket = :{port}', packet(), request)]):
            (tmp / 'app.ini').write_text(f'[uwsgi]\nmodule = app\n{ini}\n')
            server.kill(signal.SIGHUP)
            server.wait_for('^ready', i + 2)
            wait_until(lambda: len(server.workers()) == 1, 'the end of those who speak the other protocol')
            assert Answer(exchange(server.socket, path)).body == b'hello\n'
            assert Answer(exchange(('127.0.0.1', port), tcp)).body == b'hello\n'
        assert server.stop() == 0 and not os.path.exists(server.socket)

    def test_those_who_wait_at_a_socket_that_is_dropped_are_served(self, start, tmp):
        server = start(SLOW, 'socket = s')
        held = Held(server, tmp)
        waiting = [connect(server.socket) for _ in range(3)]
        for connection in waiting:
            connection.sendall(packet('hello'))
        (tmp / 'app.ini').write_text('[uwsgi]\nmodule = app\nsocket = t\n')
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        held.release()
        for connection in waiting:
            with connection:
                assert Answer(read_all(connection)).body == b'hello\n'

    def test_a_socket_whose_file_was_removed_is_made_again(self, start):
        server = start(ini='vacuum = true')
        os.unlink(server.socket)
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask().body == b'hello\n'
        assert server.stop() == 0 and not os.path.exists(server.socket)

    def test_a_socket_that_was_made_again_for_code_that_failed_to_load_is_there_once(self, start, tmp):
        server = start(HELLO + 'import os, uwsgi\nif "check" not in uwsgi.opt and os.path.exists("bad"):\n'
                               '    os.unlink("bad")\n    1 / 0\n')
        (tmp / 'bad').touch()
        os.unlink(server.socket)
        server.kill(signal.SIGHUP)
        server.wait_for('the old workers go on serving')
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        server.tracebacks_expected = True
        assert [line.count('(uwsgi)') for line in server.lines if line.startswith('listening on')] == [1, 1, 1]
        assert server.ask().body == b'hello\n'

    @pytest.mark.parametrize('program', [('-um', 'minuwsgi'), ('-u', '-m', 'minuwsgi'), ('-u', str(MINUWSGI)),
        ('-W', 'ignore', '-mminuwsgi'), ('-umminuwsgi',), ('-m', 'minuwsgi')])
    def test_a_directory_that_was_made_again_and_options_of_python_do_no_harm(self, tmp, program):
        site = tmp / 'site'

        def deploy(text):
            shutil.rmtree(site, ignore_errors=True)
            site.mkdir()
            (site / 'app.py').write_text(text)
            (site / 'app.ini').write_text(f'[uwsgi]\nmodule = app\nsocket = {tmp}/s\n')
        deploy(HELLO)
        server = Server(site, ['app.ini'], program=program)
        server.ready()
        deploy(HELLO.replace('hello', 'again'))
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        wait_until(lambda: ask(f'{tmp}/s').body == b'again\n', 'the new code')
        server.end()

    @needs_root
    @pytest.mark.parametrize('mode', [0o700, 0o755])
    def test_a_socket_that_could_not_be_made_again_is_kept(self, start, tmp, mode):
        """It is where we may not look, or it was removed from where we may not write: the others go on."""
        shutil.copy(MINUWSGI, tmp)
        (tmp / 'private').mkdir()
        (tmp / 'private').chmod(mode)
        server = start(HELLO, 'uid = nobody\nsocket = private/s', http=True, python='/usr/bin/python3')
        if mode == 0o755:
            (tmp / 'private' / 's').unlink()
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.get().body == b'hello\n'
        if mode == 0o755:
            assert 'the file of the socket was removed' in server.log
        else:
            assert ask(f'{tmp}/private/s').body == b'hello\n'

    def test_the_application_may_wait_for_the_proof_too(self, start):
        server = start(WAITS_FOR_ALL, 'worker-reload-mercy = 1')
        for i in range(2):
            server.kill(signal.SIGHUP)
            server.wait_for('^reload: trying', i + 1)
        assert server.ask().body == b'hello\n' and server.stop() == 0

    def test_a_worker_that_somebody_else_told_to_go_is_no_failure(self, start):
        server = start(ini='processes = 2')
        for pid in server.workers():
            while alive(pid):                           # it may miss one just before it waits
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGHUP)
                select.select([], [], [], 0.1)
        server.wait_for('ended: somebody else told it to', 2)
        assert server.ask().body == b'hello\n' and 'a new one comes in' not in server.log

    def test_a_reload_follows_the_link_in_which_the_server_was_started(self, tmp):
        for release in '1', '2':
            (tmp / release).mkdir()
            (tmp / release / 'deploy.py').write_text(HELLO.replace('hello', release))
            shutil.copy(MINUWSGI, tmp / release)
        os.symlink('1', tmp / 'current')
        (tmp / 'site.ini').write_text('[uwsgi]\nwsgi-file = deploy.py\nsocket = ../s\n')
        server = Server(tmp / 'current', ['../site.ini'], environment={'PWD': str(tmp / 'current')},
                        program=(MINUWSGI.name,)).ready()
        try:
            assert ask(str(tmp / 's')).body == b'1\n'
            os.symlink('2', tmp / 'new')
            os.replace(tmp / 'new', tmp / 'current')
            shutil.rmtree(tmp / '1')
            server.kill(signal.SIGHUP)
            wait_until(lambda: ask(str(tmp / 's')).body == b'2\n', 'the newer release')
        finally:
            server.end()

    def test_an_address_taken_meanwhile_does_not_end_the_server(self, start, tmp):
        """The proof can't bind; what goes wrong after the exec still leaves the old workers."""
        server = start()
        good = (tmp / 'app.ini').read_text()
        with socket.socket() as other:
            other.bind(('127.0.0.1', 0))
            other.listen()
            (tmp / 'app.ini').write_text(good + 'http-socket = 127.0.0.1:%d\n' % other.getsockname()[1])
            server.kill(signal.SIGHUP)
            server.wait_for('the old workers go on serving|the old code goes on serving')
            assert server.ask().body == b'hello\n'
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask().body == b'hello\n'

    def test_an_address_with_another_purpose_keeps_the_old_one_if_the_reload_fails(self, start, tmp):
        server = start()
        lines, port = (tmp / 'app.ini').read_text(), free_port()
        (tmp / 'app.ini').write_text(lines + f'stats = 127.0.0.1:{port}\n')
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        with socket.create_server(('127.0.0.1', 0)) as other:
            (tmp / 'app.ini').write_text(lines + f'http-socket = 127.0.0.1:{port}\n'
                                         'stats = 127.0.0.1:%d\n' % other.getsockname()[1])
            server.kill(signal.SIGHUP)
            server.wait_for('the old workers go on serving')
        with connect(('127.0.0.1', port)) as stats:
            assert json.loads(read_all(stats))['workers'] and server.ask().body == b'hello\n'

    @pytest.mark.parametrize('change', [
        'open("app.ini", "a").write("threads = four\\n")', 'open("app.ini", "a").write("chdir = /nowhere\\n")',
        'open("app.ini", "a").write("env = =x\\n")', 'open("app.ini", "w").close()',
        'open("app.ini", "w").write("[uwsgi]\\nsocket = t\\nmodule = nothing_there\\n")', 'os.unlink("app.ini")'])
    def test_what_breaks_after_the_proof_leaves_the_old_workers(self, start, tmp, change):
        server = start(HELLO + f'import os, uwsgi\nif "check" in uwsgi.opt and not os.path.exists("good"):\n'
                               f'    {change}\n', 'pidfile = p\nsocket = s')
        good, workers = (tmp / 'app.ini').read_text(), server.workers()
        server.kill(signal.SIGHUP)
        server.wait_for('the old workers go on serving')
        assert server.ask().body == b'hello\n' and server.workers() == workers
        (tmp / 'good').write_text('')
        (tmp / 'app.ini').write_text(good)
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask().body == b'hello\n' and int((tmp / 'p').read_text()) == server.pid

    def test_a_directory_that_goes_during_the_proof_leaves_the_old_code(self, start, tmp):
        server = start(HELLO + f'import shutil, uwsgi\nif "check" in uwsgi.opt:\n    shutil.rmtree("{tmp}")\n',
                       f'chdir = /\npythonpath = {tmp}', http=True)
        server.kill(signal.SIGHUP)
        server.wait_for('the directory of the start: No such file or directory; the old code goes on serving')
        assert server.get().body == b'hello\n'
        tmp.mkdir()                                     # for the end of the test

    def test_a_program_of_before_a_reload_is_told_once_too(self, start, tmp):
        (tmp / 'serve.py').write_text(TOLD_ONCE)
        os.mkfifo(tmp / 'fifo')
        server = start(ini=f'worker-exec = {sys.executable} -u serve.py')
        with connect(server.socket) as client:
            (tmp / 'app.ini').write_text('[uwsgi]\nsocket = s\nmodule = app\n')
            with open(tmp / 'fifo', 'w'):
                server.kill(signal.SIGHUP)
                server.wait_for('^told')
                assert not select.select([client], [], [], 0.5)[0]
            assert read_all(client) == b'done'
        server.wait_for('^ready', 2)

    def test_a_thread_of_the_application_does_not_hold_the_proof(self, start):
        server = start(HELLO + 'import threading, time\nthreading.Thread(target=time.sleep, args=(999,)).start()\n',
                       'worker-reload-mercy = 1')
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)

    def test_a_failed_bind_does_not_spoil_the_next_reload(self, start, tmp):
        server = start(ini='pidfile = p\nsocket = s')
        good = (tmp / 'app.ini').read_text()
        with socket.socket() as other:
            other.bind(('127.0.0.1', 0))
            other.listen()
            taken = 'http-socket = 127.0.0.1:%d\n' % other.getsockname()[1]
            (tmp / 'app.ini').write_text('[uwsgi]\n' + taken.replace('http-', '') + good.partition('\n')[2])
            server.kill(signal.SIGHUP)
            server.wait_for('the old workers go on serving')
        (tmp / 'app.ini').write_text(good)
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask().body == b'hello\n' and int((tmp / 'p').read_text()) == server.pid

    def test_a_python_that_is_gone_does_not_end_the_server(self, start, tmp):
        (tmp / 'python').symlink_to(sys.executable)
        server = start(python=str(tmp / 'python'))
        (tmp / 'python').unlink()
        server.kill(signal.SIGHUP)
        server.wait_for('the old code goes on serving')
        assert server.ask().body == b'hello\n'

    def test_workers_that_die_before_they_are_ready_do_not_hold_up_the_next_reload(self, start, tmp):
        server = start(ini='processes = 2')
        (tmp / 'app.py').write_text(
            HELLO + 'import os, uwsgidecorators\nuwsgidecorators.postfork(lambda: os._exit(3))\n')
        server.kill(signal.SIGHUP)
        server.wait_for('died: exit status 3, before it was ready')
        assert server.ask().body == b'hello\n'         # of the old workers
        (tmp / 'app.py').write_text(HELLO)
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask().body == b'hello\n'

    def test_a_worker_that_was_told_to_stop_before_a_reload_ends_without_a_word(self, start, tmp):
        server = start(SLOW)
        held = Held(server, tmp)
        for reloads in 2, 3:
            server.kill(signal.SIGHUP)
            server.wait_for('^ready', reloads)
        assert held.release().body.startswith(b'done')
        wait_until(lambda: len(server.workers()) == 1, 'the end of the old worker')
        assert 'died' not in server.log

    def test_the_request_at_hand_is_finished_by_the_old_code(self, start, tmp):
        server = start(SLOW, 'processes = 2')
        held = Held(server, tmp)
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask('hello').body == b'hello\n'
        assert held.release().body.startswith(b'done')

    def test_a_reload_during_a_reload_comes_after_it(self, start):
        server = start()
        server.kill(signal.SIGHUP)
        server.wait_for('reload: trying')
        server.kill(signal.SIGHUP)
        server.wait_for('reload: trying', 2)
        server.wait_for('^ready', 2)
        assert server.ask().body == b'hello\n'

    def test_a_touched_file_reloads(self, start, tmp):
        server = start(ini='touch-reload = touched')
        (tmp / 'touched').write_text('')
        server.wait_for('^ready', 2)
        os.utime(tmp / 'touched', (1, 1))
        server.wait_for('^ready', 3)

    def test_a_file_touched_while_the_new_code_is_loaded_reloads_again(self, start, tmp):
        (tmp / 'touched').write_text('')
        server = start(HELLO + 'import uwsgi\nif open("touched").read() == "once" and "check" not in uwsgi.opt:\n'
                               '    open("touched", "w").write("twice")\n', 'touch-reload = touched')
        (tmp / 'touched').write_text('once')
        server.wait_for('^ready', 3)

    def test_a_stop_when_the_new_code_is_found_good_is_heard(self, start):
        """At the moment when the master is about to execute itself anew."""
        for _ in range(4):
            server = start(ini='vacuum = true\npidfile = p')
            before = server.workers()
            server.kill(signal.SIGHUP)
            trying = wait_until(lambda: set(server.workers()) - set(before), 'the child that tries the new code')
            while trying & set(server.workers()):
                pass
            server.kill(signal.SIGTERM)
            assert server.wait() == 0 and not any(alive(pid) for pid in before)
            assert not os.path.exists(server.socket)


class TestHarakiri:
    """A request that takes too long is broken off, and the log says where it was."""

    def test_the_client_gets_a_504_and_the_log_the_stack(self, start):
        server = start(SLOW, 'harakiri = 0.4\nharakiri-graceful-timeout = 0.4')
        server.tracebacks_expected = True
        before = server.workers()
        assert server.ask('spin').status == '504 Gateway Timeout'
        assert re.search(r'at GET spin for [4-9]\d\d ms', server.wait_for('harakiri: worker 1'))
        assert 'in spin' in server.log
        wait_until(lambda: server.workers() != before, 'a new worker')
        assert server.ask('hello').body == b'hello\n'

    def test_who_does_not_listen_is_killed_soon_after(self, start):
        server = start(SLOW, 'harakiri = 0.4\nharakiri-graceful-timeout = 0.4')
        server.tracebacks_expected = True
        assert server.ask('deaf').raw == b''
        assert 'harakiri = 0.4, at GET deaf for ' in server.wait_for('is killed')
        assert server.ask('hello').body == b'hello\n'

    def test_threads_do_not_reset_each_other(self, start):
        server = start(SLOW, 'harakiri = 0.4\nharakiri-graceful-timeout = 0.4\nthreads = 2')
        server.tracebacks_expected = True
        load = Load(server, clients=1)
        assert server.ask('deaf').raw == b''
        server.wait_for('is killed')
        load.end()

    def test_a_client_that_lets_wait_is_no_case_for_harakiri(self, start):
        server = start(APPS, 'harakiri = 0.4\nsocket-timeout = 1\nprocesses = 2')
        before = server.workers()
        with connect(server.socket) as silent, connect(server.socket) as slow:
            slow.sendall(packet('read', b'', QUERY_STRING='i.read()', CONTENT_LENGTH='3', REQUEST_METHOD='POST'))
            for _ in range(3):
                select.select([slow], [], [], 0.3)
                slow.sendall(b'x')
            assert Answer(read_all(slow)).body == b"b'xxx'" and read_all(silent) == b''
        with connect(server.socket) as slow:            # one pause alone
            slow.sendall(packet('read', b'', QUERY_STRING='i.read()', CONTENT_LENGTH='1', REQUEST_METHOD='POST'))
            select.select([slow], [], [], 0.8)
            slow.sendall(b'x')
            assert Answer(read_all(slow)).body == b"b'x'"
        assert server.workers() == before

    def test_the_answer_to_a_failure_is_not_broken_off(self, start):
        server = start("""
            import time
            class Slow(Exception):
                def __str__(self):
                    time.sleep(0.8)
                    return 'slow to tell'
            def application(environ, start_response):
                raise Slow
            """, 'harakiri = 0.4')
        server.tracebacks_expected, before = True, server.workers()
        assert server.ask().status == '500 Internal Server Error'
        server.wait_for('slow to tell')
        assert 'harakiri' not in server.log and server.workers() == before

    def test_a_line_that_waits_for_the_log_is_no_case_for_harakiri(self, start):
        reader, writer = os.pipe()
        server = start(APPS, f'harakiri = 0.4\nreq-logger = file:/dev/fd/{writer}', pass_fds=[writer])
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b'x')
        before = server.workers()
        assert server.ask('hello').body == server.ask('hello').body == b'hello\n'
        assert server.workers() == before and 'harakiri' not in server.log
        os.close(reader), os.close(writer)

    def test_a_request_that_ends_after_the_alarm_costs_no_other(self, start, tmp):
        server = start(SLOW, 'harakiri = 0.4\nharakiri-graceful-timeout = 0.4\nthreads = 2')
        server.tracebacks_expected = True
        held = Held(server, tmp)
        server.wait_for('leaves: harakiri')
        assert held.release().body.startswith(b'done')
        held = Held(server, tmp, 'fifo2')
        select.select([], [], [], 0.5)
        assert held.release().body.startswith(b'done') and 'is killed' not in server.log

    def test_an_idle_server_does_not_wake_up(self, start):
        server = start(ini='processes = 2\nharakiri = 60')
        def switches():
            return [line for pid in (server.pid, *server.workers()) for line in
                    pathlib.Path(f'/proc/{pid}/status').read_text().splitlines() if line.startswith('voluntary')]
        server.ask()
        before = wait_until(lambda: (a := switches()) == (time.sleep(0.1), switches())[1] and a, 'rest')
        select.select([], [], [], 1.2)
        assert switches() == before


class TestRecycling:
    """A worker leaves between requests, and its successor is there first."""

    def test_max_requests_loses_no_request(self, start):
        server = start(APPS, 'processes = 2\nmax-requests = 20\ndisable-logging = true')
        load = Load(server, 'pid')
        server.wait_for('leaves: max-requests', 6)
        assert load.end() == [] and len(load.bodies) > 4

    def test_reload_on_rss_names_the_request(self, start):
        server = start(SLOW, 'reload-on-rss = 60')
        before = server.workers()
        for _ in range(3):
            assert server.ask('eat').body == b'hello\n'
        assert 'after GET eat' in server.wait_for('leaves: reload-on-rss')
        wait_until(lambda: server.workers() != before and len(server.workers()) == 1, 'a new worker')

    def test_the_limit_is_that_of_all_threads_together(self, start):
        server = start(APPS, 'max-requests = 20\nthreads = 4')
        for _ in range(22):                             # not all workers leave at the same number
            server.ask('hello')
        assert 20 <= int(server.wait_for('leaves: max-requests').rpartition(' ')[2]) <= 22

    def test_a_lifetime_ends(self, start):
        server = start(APPS, 'max-worker-lifetime = 0.3')
        before = server.ask('pid').body
        server.wait_for('leaves: max-worker-lifetime')
        wait_until(lambda: server.ask('pid').body != before, 'a new worker')


class TestCheaper:
    """The number of workers follows the load."""

    def test_a_burst_brings_more_workers_and_calm_fewer(self, start, tmp):
        server = start(SLOW, 'processes = 3\ncheaper = 1\ncheaper-overload = 1')
        assert len(server.workers()) == 1
        held = [Held(server, tmp)]
        wait_until(lambda: len(server.workers()) == 2, 'a second worker')
        held.append(Held(server, tmp, 'fifo2'))
        wait_until(lambda: len(server.workers()) == 3, 'a third worker')
        for request in held:
            assert request.release().body.startswith(b'done')
        wait_until(lambda: len(server.workers()) == 1, 'one worker')

    def test_more_workers_at_the_start_go_when_it_is_calm(self, start):
        server = start(ini='processes = 3\ncheaper = 1\ncheaper-initial = 3\ncheaper-overload = 1')
        assert len(server.workers()) == 3
        wait_until(lambda: len(server.workers()) == 1, 'one worker')

    def test_a_reload_keeps_the_number(self, start, tmp):
        server = start(SLOW, 'processes = 3\ncheaper = 1\ncheaper-overload = 99')
        held = Held(server, tmp)
        wait_until(lambda: len(server.workers()) == 2, 'a second worker')
        server.kill(signal.SIGHUP)
        server.wait_for('^ready: 2 workers')
        held.release()

    def test_the_queue_of_a_unix_socket_and_of_tcp_is_seen(self, start, tmp):
        port = free_port()
        server = start(SLOW, f'socket = s\nsocket = 127.0.0.1:{port}\nprocesses = 1\nstats = stats')
        held = Held(server, tmp)
        with contextlib.ExitStack() as stack:
            for address in (server.socket,) * 3 + (('127.0.0.1', port),) * 2:
                stack.enter_context(connect(address)).sendall(packet('hello'))
            import json
            sockets = json.loads(read_all(connect(str(tmp / 'stats'))))['sockets']
            assert [entry['queue'] for entry in sockets] == [3, 2]
        held.release()


class TestSeeing:
    """What the server does can be seen from outside."""

    def test_stats_has_uwsgis_keys_and_no_variables(self, start, tmp):
        import json
        server = start(SLOW, 'processes = 2\nstats = stats')
        held = Held(server, tmp)
        text = read_all(connect(str(tmp / 'stats'))).decode()
        stats = json.loads(text)
        assert {'version', 'listen_queue', 'pid', 'uid', 'gid', 'cwd', 'locks', 'sockets', 'workers'} <= set(stats)
        assert [worker['status'] for worker in stats['workers']].count('busy') == 1
        assert {'id', 'pid', 'requests', 'exceptions', 'status', 'rss', 'vsz', 'tx', 'avg_rt', 'apps', 'cores'} <= set(
            stats['workers'][0])
        assert 'HTTP_HOST' not in text and str(held.fifo) not in text
        held.release()

    def test_health_and_metrics_even_when_all_are_busy(self, start, tmp):
        port = free_port()
        server = start(SLOW, f'stats = 127.0.0.1:{port}\nstats-http = true')
        held = Held(server, tmp)
        server.http = '127.0.0.1', port
        assert server.get('/health').body == b'ok\n'
        assert 'minuwsgi_worker_busy{worker="1"} 1' in server.get('/metrics').text
        assert server.get('/').header('content-type') == 'application/json'
        held.release()

    def test_metrics_of_a_socket_with_an_odd_name(self, start, tmp):
        port = free_port()
        (tmp / 'name').write_bytes(os.fsencode(tmp) + b'/\xff')
        server = start(ini=f'socket = @(name)\nstats = 127.0.0.1:{port}\nstats-http = true')
        server.http = '127.0.0.1', port
        assert 'minuwsgi_listen_queue' in server.get('/metrics').text

    def test_usr2_tells_what_each_worker_does(self, start, tmp):
        server = start(SLOW)
        held = Held(server, tmp)
        server.kill(signal.SIGUSR2)
        server.wait_for('in slow')
        held.release()
        assert server.wait_for(r'worker 1 \(pid .*GET slow')

    def test_the_stacks_of_several_workers_do_not_mix(self, start):
        server = start(ini='processes = 4')
        for i in range(5):
            server.kill(signal.SIGUSR2)
            wait_until(lambda: len(re.findall('^worker .* idle$', server.log, re.M)) > 4 * i + 3, 'their lines')
        lines = server.log.partition('ready')[2].split('\n')[1:]
        odd = [line for line in lines if not re.fullmatch(
            r'|Stack \(most recent call first\):|  File "[^"]*", line \d+ in \S+|worker \d \(pid \d+\): idle', line)]
        assert len(lines) > 60 and not odd

    def test_usr2_shows_all_threads_and_harms_none(self, start, tmp):
        server = start(SLOW, 'threads = 3')
        before = server.workers()
        both = [Held(server, tmp, name) for name in ('a', 'b')]
        load = Load(server, clients=2)
        for i in range(20):
            server.kill(signal.SIGUSR2)
            wait_until(lambda: len(re.findall('^worker 1 .*GET slow.*GET slow', server.log, re.M)) > i, 'its line')
        assert not load.end() and server.workers() == before
        assert server.log.count('in slow') >= 40
        assert all(held.release().body.startswith(b'done') for held in both)

    def test_the_request_line_is_uwsgis(self, start, tmp):
        server = start()
        server.ask('/a?b', REMOTE_USER='joe')
        assert re.fullmatch(
            r'\[pid: \d+\|app: 0\|req: 1/1\] 127\.0\.0\.1 \(joe\) \{\d+ vars in \d+ bytes\} '
            r'\[\w+ \w+ +\d+ [\d:]+ \d+\] '
            r'GET /a\?b => generated 6 bytes in \d+ msecs \(HTTP/1\.1 200\) 2 headers in \d+ bytes '
            r'\(1 switches on core 0\)', server.wait_for('pid: '))


    @pytest.mark.parametrize('ini, line', [
        ('log-format = %(method) %(uri) %(status) %(rsize) %(var.HTTP_HOST) %(user) %(nothing) 100%',
         r'GET /a 200 6 localhost - - 100%'),
        ('log-format = {"rss": %(rssM), "werr": %(werr)}', '"rss": 0, "werr": 0}'),
        ('log-x-forwarded-for = true', r'\\] 10\\.9\\.8\\.7 \\(\\)'), ('log-date = %%Y', r'^\\d{4} - listening on')])
    def test_the_log_has_the_wanted_form(self, start, ini, line):
        server = start(ini=ini, ready=False)
        server.wait_for('ready: ')
        server.ask('/a', HTTP_X_FORWARDED_FOR='10.9.8.7')
        server.wait_for(line.replace('\\\\', '\\'))

    @pytest.mark.parametrize('option, path, logged', [
        ('log-4xx', 'status?404', True), ('log-4xx', 'hello', False), ('log-5xx', 'status?503', True),
        ('log-zero', 'empty', True), ('log-big = 5', 'hello', True), ('log-slow = 1000', 'hello', False)])
    def test_without_a_request_log_what_matters_can_still_be_logged(self, start, option, path, logged):
        server = start(APPS, f'disable-logging = true\n{option}')
        server.ask(path)
        server.stop()
        assert ('pid: ' in server.log) is logged

    def test_a_log_of_requests_alone(self, start, tmp):
        server = start(ini='req-logger = file:requests')
        server.ask('/a')
        wait_until(lambda: 'GET /a' in (tmp / 'requests').read_text(), 'the line')
        assert 'GET /a' not in server.log


    def test_the_name_of_a_process_says_what_it_is(self, start):
        server = start(ini='auto-procname = true\nprocname-prefix = x-')
        names = [pathlib.Path(f'/proc/{pid}/comm').read_text().strip() for pid in (server.pid, *server.workers())]
        assert names == ['x-uWSGI master', 'x-uWSGI worker']         # the kernel keeps 15 characters

    @pytest.mark.skipif(not shutil.which('uwsgitop'), reason='the package uwsgitop is not installed')
    def test_uwsgitop_reads_the_stats(self, start, tmp):
        start(ini='processes = 2\nstats = stats')
        screen = subprocess.run([sys.executable, '-c', 'import pty, sys; pty.spawn(sys.argv[1:])', 'timeout', '1.5',
            'uwsgitop',
                                 str(tmp / 'stats')], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                 timeout=PATIENCE,
                                env={**os.environ, 'TERM': 'xterm', 'LINES': '24', 'COLUMNS': '120'}).stdout
        assert b'uwsgi-' in screen and screen.count(b'idle') >= 2


class TestInside:
    """What an application finds that was written for uWSGI."""

    def test_the_uwsgi_module(self, start):
        server = start("""
            import os, uwsgi
            from uwsgidecorators import postfork
            forked = []
            @postfork
            def after():
                forked.append(os.getpid())
            def application(e, s):
                s('200 OK', [])
                if e['PATH_INFO'] == '/reload':
                    uwsgi.reload()
                uwsgi.log('hello from inside')
                return [repr((uwsgi.worker_id(), uwsgi.masterpid(), uwsgi.numproc, uwsgi.opt['processes'],
                              [w['id'] for w in uwsgi.workers()], forked == [os.getpid()])).encode()]
            """, 'processes = 2')
        number, master, processes, option, workers, forked = eval(server.ask().body)
        assert number in (1, 2) and (master, processes, option) == (server.pid, 2, b'2')
        assert sorted(workers) == [1, 2] and forked
        server.wait_for('hello from inside')
        server.ask('/reload')
        server.wait_for('^ready', 2)

    def test_a_user_harakiri_breaks_off_one_request(self, start):
        server = start("""
            import time, uwsgi
            def application(e, s):
                uwsgi.set_user_harakiri(1)
                e['wsgi.input'].read()
                time.sleep(100)
            """)
        server.tracebacks_expected = True
        for body in b'', b'x' * 100000:
            assert server.ask(body=body).status == '504 Gateway Timeout'

    def test_threads_and_connections_made_before_the_fork_are_named(self, start):
        server = start(HELLO + """
import socket, threading
listener = socket.create_server(('127.0.0.1', 0))
connection = socket.create_connection(listener.getsockname())
threading.Thread(target=threading.Event().wait, name='poller', daemon=True).start()
""")
        assert "the thread 'poller'" in server.log and 'opened a connection to (' in server.log

    def test_changed_code_reloads_by_itself(self, start, tmp):
        server = start(ini='py-autoreload = 1')
        (tmp / 'app.py').write_text(HELLO.replace('hello', 'other'))
        server.wait_for('^ready', 2)
        wait_until(lambda: server.ask().body == b'other\n', 'the new code')

    def test_a_busy_server_is_not_idle(self, start):
        server = start(APPS, 'idle = 0.5\ndie-on-idle = true\ndisable-logging = true')
        load = Load(server, clients=1)
        select.select([], [], [], 1.2)
        assert load.end() == []

    def test_idle_with_die_on_idle_ends_the_server(self, start):
        server = start(ini='idle = 0.5\ndie-on-idle = true')
        assert server.wait() == 0


class TestSurroundings:
    """The application finds the environment, the modules and the Python that the options name."""

    def test_env_counts_for_time_zone_and_modules_too(self, start, tmp):
        (tmp / 'lib').mkdir()
        (tmp / 'lib' / 'inlib.py').touch()
        server = start("""
            import time, inlib
            def application(e, s):
                s('200 OK', [])
                return [time.strftime('%Z', time.localtime(0)).encode()]
            """, 'env = TZ=XYZ-9\nenv = PYTHONPATH=/nix:lib\nenv = PYTHONHASHSEED=1')
        assert server.ask().body == b'XYZ'
        assert 'app.ini:4: PYTHONHASHSEED is only read when Python starts' in server.log

    def test_a_virtual_environment_is_looked_for_from_chdir_on(self, start, tmp):
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp / 'sub' / 'venv'], check=True)
        (packages,) = (tmp / 'sub' / 'venv').glob('lib/*/site-packages')
        (packages / 'in_venv.py').write_text('name = b"found"\n')
        server = start("""
            import in_venv
            def application(e, s):
                s('200 OK', [])
                return [in_venv.name]
            """, 'virtualenv = venv\nchdir = sub\npythonpath = ..\nsocket = ../s')
        assert server.ask().body == b'found'
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask().body == b'found'


class TestDaemon:
    """In the background, with a log that follows logrotate, as another user."""

    def test_the_parent_leaves_when_the_workers_are_ready(self, tmp):
        (tmp / 'app.py').write_text(HELLO)
        code, output = run(tmp, '--socket', 's', '--module', 'app', '--pidfile', 'p', '--daemonize', 'log', '--vacuum')
        assert (code, output) == (0, '')
        assert ask(str(tmp / 's')).body == b'hello\n'
        assert run(tmp, '--stop', 'p')[0] == 0
        wait_until(lambda: not (tmp / 'p').exists(), 'the end')
        assert 'ready: 1 worker' in (tmp / 'log').read_text()

    @pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGHUP])
    def test_a_parent_that_is_ended_takes_nothing_with_it(self, tmp, number):
        os.mkfifo(tmp / 'fifo')
        (tmp / 'app.py').write_text('open("fifo").read()\n' + HELLO)
        server = Server(tmp, ['--socket', 's', '--module', 'app', '--pidfile', 'p', '--daemonize', 'log'])
        with open(tmp / 'fifo', 'w'):
            server.kill(number)
            server.process.wait()
        wait_until(lambda: 'ready: 1 worker' in (tmp / 'log').read_text(), 'ready')
        assert server.ask().body == b'hello\n' and run(tmp, '--stop', 'p')[0] == 0
        wait_until(lambda: run(tmp, '--stop', 'p')[0] == 1, 'the end')
        assert 'Traceback' not in (tmp / 'log').read_text()

    def test_ctrl_c_at_the_parent_stops_the_start(self, tmp):
        os.mkfifo(tmp / 'fifo')
        (tmp / 'app.py').write_text('open("fifo").read()\n' + HELLO)
        server = Server(tmp, ['--socket', 's', '--module', 'app', '--daemonize', 'log'],
                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # & in a script ignores it
        with open(tmp / 'fifo', 'w'):
            # Again, as the first may come just before a read() that doesn't notice it.
            wait_until(lambda: server.kill(signal.SIGINT) or server.process.poll() is not None, 'the end')
            assert server.wait() == 1 and 'stopped while starting' in server.log and 'Traceback' not in server.log

    def test_without_a_master_too(self, tmp):
        (tmp / 'app.py').write_text(HELLO)
        assert run(tmp, '--socket', 's', '--module', 'app', '--pidfile', 'p', '--daemonize', 'log', '--master=false',
                   '--vacuum') == (0, '')
        assert run(tmp, '--stop', 'p')[0] == 0
        wait_until(lambda: not (tmp / 'p').exists(), 'the end')

    def test_a_log_that_cannot_be_written_ends_the_start(self, tmp):
        for option in '--logto', '--req-logger':
            name = '/nowhere/log' if option == '--logto' else 'file:/nowhere/log'
            code, output = run(tmp, '--socket', 's', '--module', 'minuwsgi:demo', option, name)
            assert code == 1 and "can't write the log /nowhere/log" in output

    def test_the_parent_tells_of_a_failed_start(self, tmp):
        code, output = run(tmp, '--socket', 's', '--module', 'nowhere', '--daemonize', 'log')
        assert code == 22 and "there is no module 'nowhere'" in output

    def test_the_log_is_renamed_when_it_is_too_large(self, start, tmp):
        server = start(ini='logto = log\nlog-maxsize = 2000\nlog-backupname = old', ready=False)
        wait_until(lambda: (tmp / 'log').exists() and 'ready' in (tmp / 'log').read_text(), 'ready')
        wait_until(lambda: server.ask('/' + 'x' * 500) and (tmp / 'old').exists(), 'the old log')
        assert (tmp / 'old').stat().st_size > 2000
        wait_until(lambda: server.ask('/there') and (tmp / 'log').exists() and '/there' in (tmp / 'log').read_text(),
                   'a line in the new log')

    @pytest.mark.parametrize('signalled', [True, False])
    def test_the_log_follows_its_name(self, start, tmp, signalled):
        server = start(ini='logto = log', ready=False)
        wait_until(lambda: (tmp / 'log').exists() and 'ready' in (tmp / 'log').read_text(), 'ready')
        os.rename(tmp / 'log', tmp / 'old')             # as logrotate does
        server.ask()
        if signalled:
            server.kill(signal.SIGUSR1)
        wait_until(lambda: server.ask('/there') and (tmp / 'log').exists(), 'the new log')
        wait_until(lambda: server.ask('/there') and '/there' in (tmp / 'log').read_text(), 'a line in the new log')

    @pytest.mark.parametrize('ini', ['logto = log', 'logto = log\nlog-maxsize = 2000\nlog-backupname = old'])
    def test_the_log_of_an_application_that_prints_follows_too(self, start, tmp, ini):
        server = start("""
            def application(e, s):
                print('it says', e['PATH_INFO'])
                s('200 OK', [])
                return [b'']
            """, 'disable-logging = true\n' + ini, ready=False)
        wait_until(lambda: (tmp / 'log').exists() and 'ready' in (tmp / 'log').read_text(), 'ready')
        if 'maxsize' in ini:
            wait_until(lambda: server.ask('/' + 'x' * 500) and (tmp / 'old').exists(), 'the old log')
        else:
            os.rename(tmp / 'log', tmp / 'old')
        wait_until(lambda: server.ask('/there') and (tmp / 'log').exists(), 'the new log')
        wait_until(lambda: server.ask('/there') and '/there' in (tmp / 'log').read_text(), 'a line in the new log')

    def test_the_log_of_requests_and_the_masters_lines_follow_too(self, start, tmp):
        server = start(ini='logto = log\nreq-logger = file:requests', ready=False)
        wait_until(lambda: (tmp / 'log').exists() and 'ready' in (tmp / 'log').read_text(), 'ready')
        for name in 'log', 'requests':
            os.rename(tmp / name, tmp / f'{name}.1')
        wait_until(lambda: server.ask() and (tmp / 'requests').exists(), 'the new log of requests')
        wait_until(lambda: [os.kill(pid, signal.SIGKILL) for pid in server.workers()] and (tmp / 'log').exists(),
                   'the new log, with lines of the master')

    def test_a_worker_is_born_without_its_log_of_requests(self, start, tmp):
        server = start(ini='req-logger = file:requests')
        (tmp / 'requests').unlink()
        (tmp / 'requests').mkdir()
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_for("req-logger: can't write the log .*: Is a directory; the lines go to the other log")
        assert server.ask('/path').body == b'hello\n' and server.wait_for('GET /path')

    def test_a_log_that_is_stdout_is_written_at_its_end_by_print_too(self, tmp):
        (tmp / 'app.py').write_text('print("first line of the application")\n' + HELLO)
        with open(tmp / 'out', 'w') as out:
            process = subprocess.Popen([sys.executable, str(MINUWSGI), 'app.py', '--socket', 's', '--logto',
                                        '/dev/stdout'], cwd=tmp, stdout=out, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: 'ready' in (tmp / 'out').read_text(), 'ready')
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
        lines = (tmp / 'out').read_text().partition('minuwsgi 0')[2].splitlines()
        assert [line.split()[0] for line in lines[1:5]] in (
            ['listening', 'warning:', 'first', 'ready:'], ['listening', 'first', 'ready:', 'stopping'])

    def test_an_application_may_catch_what_programs_print(self, start, tmp):
        server = start('''
            import os, time
            def application(e, s):
                s('200 OK', [])
                print('before')
                log, catch = os.dup(1), os.open('caught', os.O_RDWR | os.O_CREAT)
                os.dup2(catch, 1)
                time.sleep(1.1)                         # after which the log looks for its file
                print('by us')
                os.system('echo by a program')
                os.dup2(log, 1)
                print('behind')
                return [open('caught', 'rb').read()]
            ''', 'logto = log', ready=False)
        wait_until(lambda: (tmp / 'log').exists() and 'ready' in (tmp / 'log').read_text(), 'ready')
        assert server.ask().body == b'by us\nby a program\n'
        assert 'behind' in (tmp / 'log').read_text()

    @needs_root
    def test_root_is_left_for_good_before_the_application_is_loaded(self, start, tmp):
        os.chmod(tmp, 0o777)
        shutil.copy(MINUWSGI, tmp)                      # where nobody may read it, for the reload
        server = start("""
            import os
            at_load = os.getresuid(), os.getresgid(), os.getgroups()
            def application(e, s):
                s('200 OK', [])
                return [repr(at_load).encode()]
            """, 'uid = nobody\ngid = nogroup\nvacuum = true', python='/usr/bin/python3')    # one that nobody can read
        import grp
        import pwd
        uid, gid = pwd.getpwnam('nobody').pw_uid, grp.getgrnam('nogroup').gr_gid
        assert eval(server.ask().body) == ((uid,) * 3, (gid,) * 3, [gid])
        assert os.stat(server.socket).st_uid == uid
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.stop() == 0 and not os.path.exists(server.socket)

    @needs_root
    def test_files_that_the_uid_cannot_read_for_a_reload_are_told_at_the_start(self, start, tmp):
        os.chmod(tmp, 0o777)
        shutil.copy(MINUWSGI, tmp)
        (tmp / 'sub').mkdir()
        (tmp / 'secret.ini').write_text('[uwsgi]\nenv = PASSWORD=secret\n')
        (tmp / 'secret.ini').chmod(0o600)
        server = start(HELLO, 'ini = secret.ini\nuid = nobody\nchdir = sub\npythonpath = ..\nsocket = ../s',
                       python='/usr/bin/python3')
        assert 'secret.ini' in server.wait_for('no reload will work') and server.log.count('no reload will') == 1
        server.kill(signal.SIGHUP)
        assert server.wait_for('secret.ini: Permission denied') and server.wait_for('reload: failed')
        assert server.ask().body == b'hello\n'


    @needs_root
    def test_what_the_user_may_not_is_said_and_how_to_go_on(self, start, tmp):
        os.chmod(tmp, 0o755)
        shutil.copy(MINUWSGI, tmp)
        (tmp / 'home' / 'site').mkdir(parents=True)
        (tmp / 'home' / 'site' / 'shop.py').write_text(HELLO)
        (tmp / 'secret.txt').write_text('x')
        (tmp / 'secret.txt').chmod(0o600)
        python = '/usr/bin/python3'
        server = start(HELLO, f'uid = nobody\nstatic-map = /a={tmp}\nstatic-map = /b=nowhere', python=python)
        server.wait_for('static files: .*nowhere: No such file or directory')
        assert server.ask('/a/secret.txt').body == b'hello\n'
        server.wait_for('static files: .*/secret.txt: Permission denied')
        (tmp / 'home').chmod(0o700)
        server = start(ini='uid = nobody\nchdir = home/site\nmodule = shop\nsocket = t', python=python, ready=False)
        assert server.wait() == 22 and re.search(r"home/site can't be read with uid = nobody", server.log)
        output = subprocess.run([python, MINUWSGI.name, 'minuwsgi:demo', '--socket', 'u'], cwd=tmp, user='nobody',
                                capture_output=True, text=True).stderr
        assert "can't bind u: Permission denied; this user may not write there" in output


AS_SYSTEMD = '''
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(',')]
for i, fd in enumerate([os.dup2(fd, 100 + fd) for fd in fds]):
    os.dup2(fd, 3 + i)
os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
'''


class TestSystemd:
    """Socket activation and readiness, with a stand-in for systemd."""

    def test_notify_tells_the_states(self, start, tmp):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(str(tmp / 'notify'))
            systemd.settimeout(PATIENCE)
            server = start(environment={'NOTIFY_SOCKET': str(tmp / 'notify')})
            assert b'READY=1' in systemd.recv(1000)
            server.kill(signal.SIGHUP)
            assert b'RELOADING=1\nMONOTONIC_USEC=' in systemd.recv(1000)
            assert b'READY=1' in systemd.recv(1000)
            server.stop()
            assert systemd.recv(1000) == b'STOPPING=1'

    def test_the_watchdog_is_fed(self, start, tmp):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(str(tmp / 'notify'))
            systemd.settimeout(PATIENCE)
            start(environment={'NOTIFY_SOCKET': str(tmp / 'notify'), 'WATCHDOG_USEC': '1000000'})
            assert [systemd.recv(1000) for _ in range(4)].count(b'WATCHDOG=1') == 3

    def test_a_socket_of_systemd_is_used_and_never_removed(self, start, tmp):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp / 'a'))
            listener.listen()
            (tmp / 'app.py').write_text(HELLO)
            process = subprocess.Popen([sys.executable, '-c', AS_SYSTEMD, str(listener.fileno()), str(MINUWSGI),
                                        '--module', 'app', '--vacuum'], cwd=tmp, pass_fds=[listener.fileno()],
                                       stderr=subprocess.PIPE)
        try:
            lines = iter(process.stderr.readline, b'')
            assert any(line.startswith(b'ready') for line in lines)
            assert ask(str(tmp / 'a')).body == b'hello\n'
            process.send_signal(signal.SIGHUP)
            assert b'/a (uwsgi)' in next(line for line in lines if line.startswith(b'listening')).replace(b'fd://3',
                b'/a')
            assert any(line.startswith(b'ready') for line in lines)
            assert ask(str(tmp / 'a')).body == b'hello\n'
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
            process.stderr.close()
        assert (tmp / 'a').exists()

    @pytest.mark.parametrize('family, address, names', [
        (socket.AF_INET, '127.0.0.1', ['127.0.0.1:{}', 'fd://3']), (socket.AF_INET6, '::1', ['[::1]:{}', 'fd://3']),
        (socket.AF_INET6, '::', [':{}', '0.0.0.0:{}', '[::]:{}']), (socket.AF_UNIX, '\0{}', ['@{}'])])
    def test_it_is_known_by_any_of_its_names_and_may_change_them(self, tmp, family, address, names):
        port = tmp.name if family == socket.AF_UNIX else free_port()
        where = address.format(port) if family == socket.AF_UNIX else (address, port)
        (tmp / 'app.py').write_text(HELLO)
        (tmp / 'app.ini').write_text('[uwsgi]\nmodule = app\nprotocol = http\n')
        with socket.socket(family) as listener:
            listener.bind(where)
            listener.listen()
            process = subprocess.Popen([sys.executable, '-c', AS_SYSTEMD, str(listener.fileno()), str(MINUWSGI),
                                        'app.ini'], cwd=tmp, pass_fds=[listener.fileno()], stderr=subprocess.PIPE)
        try:
            for name in ['', *names]:
                if name:
                    (tmp / 'app.ini').write_text(f'[uwsgi]\nmodule = app\nhttp-socket = {name.format(port)}\n')
                    process.send_signal(signal.SIGHUP)
                assert any(line.startswith(b'ready') for line in iter(process.stderr.readline, b''))
                with socket.socket(family) as client:
                    client.settimeout(PATIENCE)
                    client.connect(where)
                    client.sendall(b'GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
                    assert Answer(read_all(client)).body == b'hello\n'
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
            process.stderr.close()

    @pytest.mark.parametrize('named', [False, True])
    def test_of_one_port_ipv4_and_ipv6_may_be_two(self, tmp, named):
        port = free_port()
        (tmp / 'app.py').write_text(HELLO)
        options = [f'--http-socket=0.0.0.0:{port}', f'--http-socket=[::]:{port}'] if named else ['--protocol=http']
        with socket.socket() as v4, socket.socket(socket.AF_INET6) as v6:
            v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for listener, host in (v4, '0.0.0.0'), (v6, '::'):
                listener.bind((host, port))
                listener.listen()
            fds = v4.fileno(), v6.fileno()
            process = subprocess.Popen([sys.executable, '-c', AS_SYSTEMD, '%d,%d' % fds, str(MINUWSGI), 'app.py',
                                        *options], cwd=tmp, pass_fds=fds, stderr=subprocess.PIPE)
        try:
            assert any(line.startswith(b'ready') for line in iter(process.stderr.readline, b''))
            for host in '127.0.0.1', '::1':
                request = b'GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'
                assert Answer(exchange((host, port), request)).body == b'hello\n'
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
            process.stderr.close()


# ---------------------------------------------------------------------------------------------
# All of it in a hostile world: bad applications, and who would like to be somebody else

BAD_APPS = SLOW + '''
def ten_thousand_headers(e, s):
    s('200 OK', [(f'X-{i}', 'y' * 20) for i in range(10000)]); return [b'x']
def endless(e, s):
    s('200 OK', [])
    while True: yield b'x' * 65536
def gibibyte(e, s):
    s('200 OK', [])
    for _ in range(1024): yield b'x' * (1 << 20)
def interrupts(e, s):
    raise KeyboardInterrupt
def generator_exit(e, s):
    raise GeneratorExit
def stop_iteration(e, s):
    raise StopIteration
def bad_iterator(e, s):
    class Bad:
        def __iter__(self): raise RuntimeError('no iterator')
    s('200 OK', []); return Bad()
def close_exits(e, s):
    class Bad(list):
        def close(self): sys.exit(3)
    s('200 OK', []); return Bad([b'x'])
def close_is_none(e, s):
    class Bad(list): close = None
    s('200 OK', []); return Bad([b'x'])
def recursion(e, s):
    return recursion(e, s)
def keeps_start(e, s):
    globals()['kept'] = s; return hello(e, s)
def old_start(e, s):
    keeps_start(e, s); kept('200 OK', [])
def clears_environ(e, s):
    e.clear(); return hello(e, s)
def spoils_environ(e, s):
    e.update(dict.fromkeys(e, object())); return hello(e, s)
def thread_exits(e, s):
    thread = threading.Thread(target=sys.exit); thread.start(); thread.join(); return hello(e, s)
def deletes_module(e, s):
    del sys.modules['app']; return hello(e, s)
def deletes_modules(e, s):
    for name in set(sys.modules) - {'sys', 'builtins'}: del sys.modules[name]
    return hello(e, s)
def moves(e, s):
    os.chdir('/'); os.umask(0o777); return hello(e, s)
def speaks_turkish(e, s):
    import locale, time
    locale.setlocale(locale.LC_ALL, 'C.UTF-8'); os.environ['TZ'] = 'Asia/Tokyo'; time.tzset(); return hello(e, s)
def default_signals(e, s):
    import signal
    if threading.current_thread() is threading.main_thread():
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_DFL)
    return hello(e, s)
def ignores_signals(e, s):
    import signal
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
    return hello(e, s)
def no_streams(e, s):
    sys.stdout = sys.stderr = None; return hello(e, s)
def forks(e, s):
    os.fork(); return hello(e, s)
def fork_raises(e, s):
    if not os.fork(): raise RuntimeError('in the child')
    return hello(e, s)
def fork_in_c(e, s):
    import ctypes
    if not ctypes.PyDLL(None).fork(): raise RuntimeError('in the child')
    return hello(e, s)
def fork_exits(e, s):
    if not os.fork(): sys.exit()
    return hello(e, s)
def fork_lives(e, s):
    child = os.fork()
    if not child: import time; time.sleep(100)
    s('200 OK', []); return [b'%d' % child]
def closes_0_to_20(e, s):
    os.closerange(0, 21); return hello(e, s)
def opens_all(e, s):
    import resource
    most = len(os.listdir('/proc/self/fd')) - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (most - 1, most)); return hello(e, s)
def thread_without_end(e, s):
    threading.Thread(target=threading.Event().wait, name='restless').start(); return hello(e, s)
def processes(e, s):
    import multiprocessing, time
    fork = multiprocessing.get_context('fork')
    process = fork.Process(target=time.sleep, args=(100,)); process.start(); process.terminate(); process.join(9)
    with fork.Pool(2) as pool: found = pool.map(abs, [-1, -2])
    s('200 OK', []); return [repr((process.exitcode, found)).encode()]
'''

# path: how the answer begins over the uwsgi protocol ('' for a connection that is just closed), what the log says
BAD = {
    'none': ('500', 'returned None'), 'a_str': ('500', 'not of str'), 'str_items': ('500', 'not of str'),
    'an_int': ('500', 'not iterable'), 'no_start': ('500', "didn't call start_response"),
    'twice': ('500', 'second time'), 'fail_early': ('500', 'before the head'),
    'fail_first': ('500', 'the first item'), 'fail_later': ('200', 'a later item'),
    'exits': ('500', 'SystemExit: 3'), 'interrupts': ('500', 'KeyboardInterrupt'),
    'generator_exit': ('500', 'GeneratorExit'), 'stop_iteration': ('500', 'StopIteration'),
    'bad_iterator': ('500', 'no iterator'), 'close_exits': ('200', 'SystemExit: 3'),
    'close_is_none': ('200', 'NoneType'), 'recursion': ('500', 'RecursionError'),
    'old_start': ('500', 'a second time'), 'clears_environ': ('200', ''), 'spoils_environ': ('200', ''),
    'thread_exits': ('200', ''), 'deletes_module': ('200', ''), 'deletes_modules': ('200', ''),
    'moves': ('200', ''), 'speaks_turkish': ('200', ''), 'default_signals': ('200', ''), 'no_streams': ('200', ''),
    'leave': ('', 'exit status 7'), 'closes_0_to_20': ('', 'died: exit status'), 'forks': ('200', 'came back'),
    'fork_raises': ('200', 'in the child'), 'fork_in_c': ('200', 'in the child'), 'fork_exits': ('200', ''),
    'ten_thousand_headers': ('200', '')}
HELLO_HEAD = b'HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n'


class TestBadApps:
    """Whatever an application does, the next request is answered, and a stop is a clean end."""

    @pytest.mark.parametrize('ini', ['', 'threads = 2', 'http'])
    def test_after_a_bad_request_the_next_is_answered_right(self, start, ini):
        server = start(BAD_APPS, ini.replace('http', '') + '\ndisable-logging = true', http=ini == 'http')
        server.tracebacks_expected = True
        for path, (status, words) in BAD.items():
            before = len(server.lines)
            answer = server.get('/' + path) if ini == 'http' else server.ask(path)
            assert answer.status.startswith(status) and bool(answer.raw) == bool(status), (path, answer.raw[:200])
            assert answer.raw.count(b'HTTP/1.1') <= 1, path
            for _ in range(3):
                assert (server.get('/hello').body == b'hello\n' if ini == 'http' else
                        server.ask('hello').raw == HELLO_HEAD), path
            wait_until(lambda: words in '\n'.join(server.lines[before:]), f'{words} after {path}')
            raised = [line for line in server.lines[before:] if re.match(r'[\w.]+(Error|Exit|Interrupt|Gone)\b', line)]
            assert all(words in line for line in raised), (path, raised)
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        assert server.ask('hello').raw == HELLO_HEAD
        assert server.stop() == 0 and 'killed' not in server.log

    def test_all_of_ten_thousand_headers_arrive(self, start):
        server = start(BAD_APPS, http=True)
        assert len(server.ask('ten_thousand_headers').headers) == 10000
        assert len(server.get('/ten_thousand_headers').headers) > 10000

    @pytest.mark.parametrize('way', ['uwsgi', 'http'])
    def test_an_answer_without_end_ends_with_its_client(self, start, way):
        server = start(BAD_APPS, http=True)
        worker = server.ask('pid').body
        with connect(server.socket if way == 'uwsgi' else server.http) as connection:
            connection.sendall(packet('endless') if way == 'uwsgi' else b'GET /endless HTTP/1.1\r\nHost: x\r\n\r\n')
            for _ in range(20):
                assert connection.recv(1 << 16)
        assert server.ask('pid').body == worker

    def test_a_gibibyte_from_a_generator_leaves_the_memory_flat(self, start):
        server = start(BAD_APPS)
        worker, = server.workers()

        def peak():
            return int(re.search(r'VmHWM:\s+(\d+)', pathlib.Path(f'/proc/{worker}/status').read_text())[1]) / 1024
        server.ask('hello')
        before, size, buffer = peak(), 0, bytearray(1 << 20)
        with connect(server.socket) as connection:
            connection.sendall(packet('gibibyte'))
            while got := connection.recv_into(buffer):
                size += got
        assert size == (1 << 30) + len('HTTP/1.1 200 OK\r\n\r\n') and peak() - before < 10

    @pytest.mark.parametrize('ini', ['', 'threads = 2', 'socket = s\nhttp-socket = h'])
    def test_a_child_of_the_application_holds_no_client_and_its_own_children_can_be_ended(self, start, ini):
        server = start(BAD_APPS, ini)
        child = int(server.ask('fork_lives').body)              # it is read to the end of the connection
        assert alive(child)
        os.kill(child, signal.SIGTERM)
        wait_until(lambda: not alive(child), 'the end of the child')
        assert server.ask('processes').body == b'(-15, [1, 2])'
        assert not children(server.workers()[0]) and server.ask('hello').body == b'hello\n'

    @pytest.mark.parametrize('ini', ['threads = 2', 'socket = s\nsocket = t\nthreads = 2'])
    def test_an_application_that_holds_all_descriptors_gets_a_successor(self, start, ini):
        server = start(BAD_APPS, ini)
        assert server.ask('opens_all').body == b'hello\n'
        assert server.ask('hello').body == b'hello\n'
        server.wait_for('leaves: the application holds all descriptors')

    def test_signals_of_the_application_are_its_own_unless_they_harm(self, start):
        server = start("""
            import signal, time
            class Rang(Exception): pass
            def ring(*_): raise Rang
            signal.signal(signal.SIGALRM, ring)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            def application(e, s):
                s('200 OK', [])
                if e['PATH_INFO'] == '/stream':
                    return (b'x' * 10000 for _ in range(100))
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.05)
                    time.sleep(10)
                except Rang:
                    return [b'rang']
            """)
        assert server.ask().body == b'rang'
        send_and_leave(server.socket, packet('/stream'), False)
        assert server.ask().body == b'rang' and 'died' not in server.log

    def test_who_patches_python_is_told(self, start, tmp):
        server = start('import select\ndel select.epoll\n' + HELLO, ready=False)
        assert server.wait() == 22 and 'monkey.patch_all() of gevent or eventlet' in server.log

    def test_an_application_that_waits_for_our_children_does_no_harm(self, start):
        server = start(WAITS_FOR_ALL)
        before = server.workers()
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: server.workers() not in ([], before), 'another worker')
        assert server.ask().body == b'hello\n'

    def test_a_stop_is_not_held_up_in_silence(self, start, tmp):
        """Three servers, stopped at once: a thread in the worker, one in the master, signals that are not heeded."""
        servers = []
        for i, path in enumerate(['thread_without_end', 'hello', 'ignores_signals']):
            more = "threading.Thread(target=threading.Event().wait, name='in the master').start()" if i == 1 else ''
            servers.append(start(BAD_APPS + more, f'socket = s{i}\nworker-reload-mercy = {(1, 1, 60)[i]}'))
            assert ask(str(tmp / f's{i}'), path).body == b'hello\n'
        for server in servers:
            server.kill(signal.SIGTERM)
        assert "waits for the thread 'restless'" in servers[0].wait_for('has 1 s to end')
        assert "waits for the thread 'in the master'" in servers[1].wait_for('has 1 s to end')
        assert 'did the application set a handler' in servers[2].wait_for('is killed')
        assert [server.wait() for server in servers] == [0, 0, 0]

    @pytest.mark.parametrize('ini', ['', 'lazy-apps = true', 'master = false'])
    def test_what_an_application_spoils_while_it_is_loaded_does_no_harm(self, start, tmp, ini):
        server = start(HELLO + """
import os, signal, sys
print('left in the buffer of a stream that is closed')
sys.stdout = None
sys.stderr.close()
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.set_wakeup_fd(-1)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.chdir('/')
os.umask(0o777)
""", f'stats = stats\npidfile = pid\ntouch-reload = {tmp}/touched\n{ini}')
        if ini != 'master = false':
            assert server.ask().body == b'hello\n'
            server.kill(signal.SIGHUP)
            server.wait_for('^ready', 2)
        assert server.ask().body == b'hello\n'
        assert server.stop() == 0 and 'killed' not in server.log


# what steered uWSGI, and what would steer a program or Python itself
STEERING = tuple(("UWSGI_FILE UWSGI_SCRIPT UWSGI_MODULE UWSGI_CALLABLE UWSGI_CHDIR UWSGI_PYHOME UWSGI_SETENV "
                  "UWSGI_APPID UWSGI_TOUCH_RELOAD UWSGI_POSTFILE DOCUMENT_ROOT SCRIPT_FILENAME PATH_TRANSLATED "
                  "SCRIPT_NAME LD_PRELOAD PATH PYTHONPATH PYTHONSTARTUP BASH_ENV ENV PERL5OPT RUBYOPT HOME TMPDIR "
                  "SSL_CERT_FILE").split())


class TestSecurity:
    """Nobody gets in who isn't let in, and nobody gets out of what he is."""

    @pytest.mark.parametrize('ini', ['', 'mount = /other=app:application\nmanage-script-name', 'check-static = public',
                                     'cgi = /cgi=bin'])
    def test_no_variable_of_a_request_chooses_code_or_files(self, start, tmp, ini):
        (tmp / 'evil.py').write_text('open("evil", "w")\napplication = None\n')
        (tmp / 'public').mkdir()
        (tmp / 'bin').mkdir()
        (tmp / 'bin/env').write_text(PING_CGI + 'env')
        (tmp / 'bin/env').chmod(0o755)
        server = start("import os\ndef application(e, s):\n  s('200 OK', [])\n  return [os.getcwd().encode()]",
                       f'module = app\n{ini}')
        for value in f'{tmp}/evil.py', 'evil', 'evil:application', f'{tmp}', f'PYTHONPATH={tmp}', '/evil':
            for names in (STEERING, *zip(STEERING)):
                assert server.ask('/', **dict.fromkeys(names, value)).body == str(tmp).encode()
            if 'cgi' in ini:
                found = server.ask('/cgi/env', **{**dict.fromkeys(STEERING, value), 'SCRIPT_NAME': ''}).text
                assert f'SCRIPT_FILENAME={tmp}/bin/env\n' in found
                assert {line.partition('=')[0] for line in found.splitlines() if value in line} <= {'DOCUMENT_ROOT'} | {
                    name for name in ('SCRIPT_FILENAME', 'PWD', 'OLDPWD', 'PATH_TRANSLATED') if value in str(tmp)}
        assert not (tmp / 'evil').exists()

    @pytest.mark.parametrize('end', ['\r\n', '\n', '\r', '\0', '\r\n\r\n'])
    def test_no_text_of_an_application_ends_a_line_of_the_head(self, apps, end):
        apps.tracebacks_expected = True
        for status, headers in ((f'200 OK{end}Evil: 1', []), ('200 OK', [('X', f'a{end}Evil: 1')]),
                                ('200 OK', [(f'X{end}Evil', 'a')]), ('200 OK', [(f'X: a{end}Evil', 'a')])):
            query = ascii((status, headers)).replace(' ', '')
            for answer in apps.ask('bad_head', QUERY_STRING=ascii((status, headers))), apps.get(f'/bad_head?{query}'):
                assert answer.status == '500 Internal Server Error' and b'Evil' not in answer.raw

    def test_nor_does_one_of_another_language(self, start, tmp):
        (tmp / 'config.ru').write_text('run ->(env) { [env["QUERY_STRING"] == "s" ? "200 OK\\r\\nEvil: 1" : 200, '
                                       '{ "x-a\\r\\nEvil" => "b\\r\\nEvil: 1" }, ["ok"]] }')
        (tmp / 'app.psgi').write_text('sub { [$_[0]{QUERY_STRING} eq "s" ? "200 OK\\r\\nEvil: 1" : 200, '
                                      '["X-A\\r\\nEvil" => "b\\r\\nEvil: 1"], ["ok"]] }')
        servers = {}
        for line, program in ('rack = config.ru', 'ruby'), ('psgi = app.psgi', 'perl'):
            if is_there(program):
                servers[line[0]] = start(ini=f'{line}\nsocket = {line[0]}', ready=False)
                servers[line[0]].wait_for('listening')          # it has read app.ini
        for name, server in servers.items():
            server.ready()
            for path in '/', '/?s':
                answer = ask(str(tmp / name), path)
                assert answer.status.startswith('200') and answer.text == 'ok'
                assert b'\nEvil' not in answer.raw and b'\rEvil' not in answer.raw

    def test_no_underscore_passes_for_a_hyphen_over_http(self, start):
        server = start(ENVIRON_APP, http=True)
        found = eval(server.get('/', 'X_Real_Ip: 6.6.6.6\r\nX-Real_Ip: 6.6.6.6\r\nRemote_User: root\r\n_X: 6.6.6.6\r\n'
                                     'Http_Host: evil\r\nContent_Length: 66\r\nTransfer_Encoding: chunked\r\n').body)
        assert not {'HTTP_X_REAL_IP', 'HTTP_REMOTE_USER', 'REMOTE_USER', 'HTTP_HTTP_HOST', 'CONTENT_LENGTH',
                    'HTTP_TRANSFER_ENCODING'}.intersection(found) and '6.6.6.6' not in found.values()

    def test_a_public_address_for_the_uwsgi_protocol_is_warned_of(self, start):
        ports = [free_port() for _ in range(5)]
        server = start(ini='socket = s\nsocket = :{}\nsocket = 127.0.0.1:{}\nsocket = [::1]:{}\nsocket = [::]:{}\n'
                           'http-socket = :{}'.format(*ports))
        warned = [line.split()[1] for line in server.lines if 'uwsgi protocol' in line]
        assert warned == [f'0.0.0.0:{ports[0]}', f'[::]:{ports[3]}']
        assert 'firewall' in server.wait_for('uwsgi protocol')

    @needs_root
    def test_root_is_warned_of_once_and_nobody_else(self, start, tmp):
        os.chmod(tmp, 0o777)
        assert start().log.count('runs as root') == 1
        server = start(ini='socket = t\nuid = nobody', python='/usr/bin/python3')
        assert 'runs as root' not in server.log

    @needs_root
    def test_the_privileges_of_root_are_gone_for_good(self, start, tmp):
        os.chmod(tmp, 0o777)
        (tmp / 'root').touch(0o600)
        server = start("""
            import os
            def tried(function, *arguments):
                try:
                    return function(*arguments)
                except PermissionError:
                    return 'refused'
            def application(e, s):
                s('200 OK', [])
                return [repr([
                    tried(os.setuid, 0), tried(os.seteuid, 0), tried(os.setresuid, 0, 0, 0), tried(os.setgid, 0),
                    tried(os.setgroups, [0]), tried(open, 'root'), tried(os.kill, 1, 0)]).encode()]
            """, 'uid = nobody\nreq-logger = file:requests\nprocesses = 2', python='/usr/bin/python3')
        assert eval(server.ask().body) == ['refused'] * 7
        wait_until(lambda: 'GET /' in (tmp / 'requests').read_text(), 'a line of the request')
        ids = grp.getgrnam('nogroup').gr_gid
        for pid in server.pid, *server.workers():
            status = pathlib.Path(f'/proc/{pid}/status').read_text()
            assert re.search(rf'Gid:\t{ids}\t{ids}\t{ids}\t{ids}\n', status) and 'CapEff:\t0000000000000000' in status
        code, output = run(tmp, '--socket', 'u', '--module', 'app', '--uid', '54321')
        assert code == 1 and 'set gid too' in output and 'Traceback' not in output

    def test_no_file_can_be_written_by_everybody(self, start, tmp):
        server = start(ini='umask = 000\nlogto = log\nreq-logger = file:requests\npidfile = pid\nstats = stats\n'
                           'socket = s', ready=False, umask=0)
        wait_until(lambda: (tmp / 'log').exists() and 'ready' in (tmp / 'log').read_text(), 'ready')
        server.ask()
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp.iterdir() if file.name[:3] != 'app'}
        modes.pop('__pycache__', None)
        assert modes == {'s': '0o660', 'stats': '0o660', 'log': '0o640', 'requests': '0o640', 'pid': '0o644'}

    def test_what_the_application_starts_inherits_0_1_and_2_alone(self, start):
        server = start("""
            import os, subprocess
            def inherited():
                ls = 'ls', '-l', '/proc/self/fd'
                return [subprocess.run(ls, stdout=-1, close_fds=False).stdout,
                        subprocess.run(ls, stdout=-1, close_fds=False, preexec_fn=int).stdout,
                        os.popen('exec ls -l /proc/self/fd').read().encode()]
            at_load = inherited()
            def application(e, s):
                e['wsgi.input'].read(1)
                s('200 OK', [])
                return [repr(at_load + inherited()).encode()]
            """, 'processes = 2\nthreads = 2\nstats = t\npidfile = p\nreq-logger = file:l', http=True)
        for reload in False, True:
            if reload:
                server.kill(signal.SIGHUP)
                server.wait_for('^ready', 2)
            with connect(server.socket), connect(server.http):
                for found in eval(server.ask(body=b'xx').body):
                    assert re.findall(rb'(\d+) ->', found) == [b'0', b'1', b'2', b'3'], found.decode().split('\n')

    @needs_root
    @pytest.mark.parametrize('option', ['logto = link', 'req-logger = file:link', 'pidfile = link', 'socket = link',
                                        'daemonize = link'])
    def test_a_link_in_a_shared_directory_leads_nowhere(self, tmp, option):
        """As in /tmp: everybody may make files in it."""
        os.chmod(tmp, 0o777)                            # not sticky: for that the kernel has a rule of its own
        (tmp / 'precious').write_text('precious')
        (tmp / 'link').symlink_to('precious')
        os.lchown(tmp / 'link', 65534, 65534)
        (tmp / 'app.ini').write_text(f'[uwsgi]\nmodule = minuwsgi:demo\nsocket = s\n{option}\n')
        code, output = run(tmp, 'app.ini')
        assert code == 1 and ('a link, made by the user 65534' in output or "isn't a socket" in output)
        assert (tmp / 'precious').read_text() == 'precious' and (tmp / 'link').is_symlink()

    def test_a_link_of_our_own_is_followed(self, start, tmp):
        for name in 'log', 'requests', 'pid':
            (tmp / name).symlink_to('real-' + name)
        server = start(ini='logto = log\nreq-logger = file:requests\npidfile = pid', ready=False)
        wait_until(lambda: (tmp / 'real-log').exists() and 'ready' in (tmp / 'real-log').read_text(), 'ready')
        server.ask()
        wait_until(lambda: 'GET /' in (tmp / 'real-requests').read_text(), 'the line of the request')
        assert int((tmp / 'real-pid').read_text()) == server.pid

    def test_no_secret_is_told(self, start, tmp):
        ini = textwrap.dedent("""
            [uwsgi]
            module = app
            socket = s
            stats = stats
            env = DB=pa$$99secret
            env = OTHER=$(NOPE)99secret
            db_password = hunter #99secret
            my-token = "99secret"
            api_key = $(NOPE)99secret
            set-ph = dsn=99secret
            pyargv = --with=%(dsn) --and=$(API_TOKEN)
            """)
        server = start(HELLO + "import os\nassert '99secret' in os.environ['DB']\n", ini, ready=False,
                       environment={'API_TOKEN': 'from99secret', 'UWSGI_API_KEY': '$(X)99secret'})
        server.wait_for('^ready')
        server.ask('/', HTTP_AUTHORIZATION='99secret', HTTP_COOKIE='99secret')
        server.kill(signal.SIGUSR2)
        server.wait_for('^worker 1')
        texts = [server.log, read_all(connect(str(tmp / 'stats'))).decode()]
        (tmp / 'bad.ini').write_text(ini + 'env = 99secret\nvaccum\n')
        for option in '--show-config', '--check', '--strict':
            texts.append(run(tmp, 'bad.ini', option, env={**os.environ, 'API_TOKEN': 'from99secret'})[1])
        assert all(texts) and not [line for text in texts for line in text.split('\n') if '99secret' in line]


# ---------------------------------------------------------------------------------------------
# 11b. Soak: python3 test_minuwsgi.py --soak MINUTES

class Visitor:
    """A client for Load that does something else each time; it returns what was wrong, or None."""

    DOES = 'get', 'get', 'get', 'post', 'upload', 'unread', 'download', 'slow', 'stream', 'error', 'leave', 'keep'

    def __init__(self, server, file, pause):
        self.server, self.file, self.pause, self.content = server, str(file), pause, file.read_bytes()
        self.counts = dict.fromkeys(self.DOES, 0)

    def __call__(self, chance):
        what = chance.choice(self.DOES)
        time.sleep(chance.random() * 2 * self.pause)
        wrong = getattr(self, what)(chance)
        self.counts[what] += 1
        return wrong and f'{what}: {wrong}'

    def over_http(self, path, body=None, **headers):
        with contextlib.closing(http.client.HTTPConnection(*self.server.http, timeout=PATIENCE)) as connection:
            connection.request('POST' if body else 'GET', path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def either(self, chance, path, body=b'', **variables):
        """(status, body) over one of the two protocols."""
        if chance.random() < 0.5:
            return self.over_http('/' + path, body, **{name[5:]: value for name, value in variables.items()})
        answer = self.server.ask(path, body, **variables)
        return int(answer.status[:3] or 0), answer.body

    def expect(self, found, status, body):
        return None if found == (status, body) else f'{found[0]}, {len(found[1])} bytes: {found[1][:80]}'

    def get(self, chance):
        return self.expect(self.either(chance, 'hello'), 200, b'hello\n')

    def post(self, chance, size=300):
        return self.expect(self.either(chance, 'read?len(i.read())', b'x' * size), 200, b'%d' % size)

    def upload(self, chance):
        return self.post(chance, chance.randrange(1 << 20))

    def unread(self, chance):
        return self.expect(self.either(chance, 'unread', b'x' * chance.randrange(1, 200000)), 401, b'no')

    def download(self, chance):
        return self.expect(self.either(chance, 'file', HTTP_FILE=self.file), 200, self.content)

    def stream(self, chance):
        return self.expect(self.either(chance, 'stream'), 200, b'x' * 5_000_000)

    def error(self, chance):
        return self.expect(self.either(chance, 'fail_early'), 500, b'500 Internal Server Error\n')

    def slow(self, chance):
        """Reads a file in small pieces."""
        with connect(self.server.socket) as connection:
            connection.sendall(packet('file', HTTP_FILE=self.file))
            found = b''
            while new := connection.recv(chance.randrange(1, 200_000)):
                found += new
                time.sleep(self.pause / 10)
        return self.expect((200, found.partition(b'\r\n\r\n')[2]), 200, self.content)

    def leave(self, chance):
        """Goes away: in the middle of the head or of the body, before or amid the answer."""
        path = chance.choice(['hello', 'file', 'stream', 'read?i.read()', 'unread'])
        data = packet(path, b'x' * chance.choice([0, 9, 100_000]), HTTP_FILE=self.file)
        if over_http := chance.random() < 0.5:
            data = f'POST /{path} HTTP/1.1\r\nHost: x\r\nFile: {self.file}\r\nContent-Length: 9000\r\n\r\n'.encode()
            data += b'x' * 9000
        with connect(self.server.http if over_http else self.server.socket) as connection, \
                contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data[:chance.choice([len(data), chance.randrange(len(data))])])
            if chance.random() < 0.5:
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    time.sleep(self.pause)
                    connection.recv(chance.randrange(1, 100_000))

    def keep(self, chance):
        """Some requests on one connection, which a server that reloads may close between two of them."""
        with contextlib.closing(http.client.HTTPConnection(*self.server.http, timeout=PATIENCE)) as connection:
            for i in range(5):
                try:
                    connection.request('GET', '/hello')
                    answer = connection.getresponse()
                except ConnectionError:
                    if i == 0:
                        raise
                    return None
                if wrong := self.expect((answer.status, answer.read()), 200, b'hello\n'):
                    return wrong
                time.sleep(self.pause)


def weight(pid):
    """(resident memory in MB, open descriptors) of a process; zeros when it is gone."""
    try:
        pages = int(pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1])
        return round(pages * os.sysconf('SC_PAGESIZE') / 1e6, 1), len(os.listdir(f'/proc/{pid}/fd'))
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0


def weights(server):
    """Of the master, then of each worker."""
    workers = wait_until(lambda: len(found := server.workers()) == 2 and found, 'two workers')
    return [weight(pid) for pid in (server.pid, *workers)]


def shake(server, load, until, interval):
    """Reload the server and kill its workers in turn: [(begin, end)] of each kill."""
    kills, reloads = [], 0
    while time.monotonic() < until:
        load.more(20)
        if len(kills) > reloads:
            reloads += 1
            server.kill(signal.SIGHUP)
            server.wait_for('^ready', reloads + 1)
        else:
            began = time.monotonic()
            kill_a_worker(server, len(kills))
            kills.append((began, time.monotonic()))
        time.sleep(max(0.0, min(interval, until - time.monotonic())))
    return kills, reloads


def soak(minutes, say=print):
    """Two workers under mixed load, reloads and kills, then a calm third to see whether they grow. True if all is
    well: what fails was at hand in a worker that was killed, and neither memory nor descriptors grow."""
    seconds = minutes * 60
    with tempfile.TemporaryDirectory(prefix='mu') as name:
        tmp, port = pathlib.Path(name), free_port()
        (tmp / 'app.py').write_text(SLOW + """
def stream(e, s):
    s('200 OK', []); return (b'x' * 50_000 for _ in range(100))
""")
        (tmp / 'file').write_bytes(random.Random(1).randbytes(5_000_000))
        server = Server(tmp, ['--module', 'app', '--socket', 's', '--http-socket', f'127.0.0.1:{port}', '--processes',
                              '2', '--disable-logging'])
        server.http, server.tracebacks_expected = ('127.0.0.1', port), True
        try:
            server.ready()
            visitor = Visitor(server, tmp / 'file', pause=0.05 if seconds > 60 else 0.002)
            load, start = Load(server, visit=visitor), time.monotonic()
            load.more(100)
            states = [weights(server)]
            kills, reloads = shake(server, load, start + seconds * 2 / 3, min(30, seconds / 20))
            load.more(100)
            states.append(weights(server))
            while (left := start + seconds - time.monotonic()) > 0:
                time.sleep(left)
            load.more(20)
            states.append(weights(server))
            load.end()
            time.sleep(0.1)
            states.append(weights(server))
            lost, unexplained = [], []
            for began, ended, what in load.failures:
                killed = any(began <= end and ended >= begin for begin, end in kills)
                (lost if killed else unexplained).append(what)
            unexplained += [line for line in server.lines if re.match(r'[\w.]+(Error|Exception|Gone)\b', line)
                            and 'fails before the head' not in line or 'reload: failed' in line]
            if server.stop() != 0:
                unexplained.append('the exit code')
        finally:
            server.end()
        say(f'{load.answered} requests in {seconds:.0f} s: '
            + ', '.join(f'{number} {what}' for what, number in visitor.counts.items()))
        say(f'{reloads} reloads, {len(kills)} workers killed')
        say(f'failures: {len(lost)} in workers that were killed, {len(unexplained)} unexplained')
        for what in [*lost[:20], *(f'unexplained: {what}' for what in unexplained[:20])]:
            say(f'    {what}')
        for i, what in enumerate(['resident memory (MB)', 'descriptors']):
            say(f'{what} of the master and the workers: ' + '; '.join(
                f'{when} {" ".join(str(found[i]) for found in state)}'
                for when, state in zip(['at the begin', 'in the middle', 'at the end', 'at rest'], states)))
        begin, middle, end, rest = states
        grown = [f'{after[0]} MB after {before[0]}' for before, after in zip(middle, end)
                 if after[0] > before[0] * 1.2 + 5] if seconds > 60 else []
        grown += [f'{after[1]} descriptors after {before[1]}' for before, after in zip(begin, rest)
                  if after[1] > max(before[1], 16)]
        say('grown: ' + ', '.join(grown) if grown else 'nothing grows')
        return not unexplained and not grown


def test_a_short_soak_finds_nothing():
    said = []
    assert soak(0.02, said.append), '\n'.join(said)
    assert 'unexplained' in '\n'.join(said)


# ---------------------------------------------------------------------------------------------
# All of it behind nginx, with real applications

NGINX_CONF = '''
daemon off;
{user}
worker_processes 1;
pid nginx.pid;
error_log nginx.log info;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_max_body_size 0;
    client_body_temp_path body;
    uwsgi_temp_path uwsgi;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    scgi_temp_path scgi;
{http}
}}
'''


class Nginx:
    """The real nginx in a directory of its own; `sites` names what it offers, each at a port of its
    own: {name: the lines of a server block}. Debian's uwsgi_params can be included."""

    def __init__(self, directory, sites, http='', user='root'):
        self.directory = directory / 'nginx'
        self.directory.mkdir()
        self.directory.chmod(0o755)
        self.ports = {name: free_port() for name in sites}
        http += ''.join(f'server {{ listen 127.0.0.1:{self.ports[name]}; {lines} }}\n' for name, lines in sites.items())
        self.configure(http, user)
        self.process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        for port in self.ports.values():
            wait_until(lambda: self.listens(port), f'nginx ({self.log()}) at port {port}')

    def configure(self, http, user='root'):
        shutil.copy('/etc/nginx/uwsgi_params', self.directory)
        conf = NGINX_CONF.format(http=http, user=f'user {user};' if os.getuid() == 0 else '')
        (self.directory / 'nginx.conf').write_text(conf)

    def command(self, *more):
        return [NGINX, '-p', f'{self.directory}/', '-c', 'nginx.conf', '-e', 'nginx.log', *more]

    def listens(self, port):
        assert self.process.poll() is None, self.log()
        with socket.socket() as probe:
            return probe.connect_ex(('127.0.0.1', port)) == 0

    def log(self):
        log = self.directory / 'nginx.log'
        return log.read_text() if log.exists() else ''

    def url(self, site, path='/'):
        return f'http://127.0.0.1:{self.ports[site]}{path}'

    def ask(self, site, path='/', body=None, method=None, **headers):
        """A response of http.client, with its whole body in `.content`."""
        with contextlib.closing(http.client.HTTPConnection('127.0.0.1', self.ports[site], PATIENCE)) as connection:
            connection.request(method or ('GET' if body is None else 'POST'), path, body, headers)
            answer = connection.getresponse()
            answer.content = answer.read()
            return answer

    def load(self, site, threads, until, most=600):
        """GET / from several threads until an event is set; [status or exception of each request]."""
        found = []

        def ask():
            while not until.is_set() and len(found) < most:
                try:
                    found.append(self.ask(site).status)
                except Exception as error:
                    found.append(error)
        running = [threading.Thread(target=ask) for _ in range(threads)]
        for thread in running:
            thread.start()
        return found, running

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture
def nginx(tmp):
    """nginx({name: lines of a server block}) starts the real nginx."""
    if NGINX is None:
        pytest.skip('nginx is not installed')
    started = []

    def start_nginx(*arguments, **options):
        started.append(Nginx(tmp, *arguments, **options))
        return started[-1]
    yield start_nginx
    for one in started:
        one.stop()


UWSGI = 'location / {{ include uwsgi_params; uwsgi_pass unix:{}/s; }}'
KEPT = 'location / { proxy_pass http://kept; proxy_http_version 1.1; proxy_set_header Connection ""; }'
SITE = '''
import os

CHUNK = bytes(range(256)) * 256
TEXT = [('Content-Type', 'text/plain')]

def application(environ, start_response):
    status, headers, body = globals()['do_' + (environ['PATH_INFO'].strip('/') or 'hello')](environ)
    start_response(status, TEXT + headers)
    return body

def do_hello(environ):
    return '200 OK', [('Content-Length', '6')], [b'hello\\n']

def do_echo(environ):
    body = environ['wsgi.input'].read()
    return '200 OK', [('Content-Length', str(len(body)))], [body]

def do_unread(environ):
    return '401 Unauthorized', [('Content-Length', '3')], [b'no\\n']

def do_list(environ):
    return '200 OK', [('Content-Length', str(80 * len(CHUNK)))], [CHUNK] * 80

def do_generator(environ):
    return '200 OK', [], (CHUNK for _ in range(80))

def do_endless(environ):
    def chunks():
        try:
            for _ in range(100_000):
                yield CHUNK
        finally:
            print('the endless one was closed for', environ['QUERY_STRING'], file=environ['wsgi.errors'])
    return '200 OK', [], chunks()

def do_file(environ):
    return '200 OK', [], environ['wsgi.file_wrapper'](open('big', 'rb'))

def do_cookie(environ):
    return '200 OK', [], [str(len(environ['HTTP_COOKIE'])).encode()]

def do_empty(environ):
    return '204 No Content', [], []

def do_same(environ):
    return '304 Not Modified', [('ETag', '"1"')], []

def do_port(environ):
    return '200 OK', [], [environ['REMOTE_PORT'].encode()]

def do_who(environ):
    return '200 OK', [], [' '.join(environ[n] for n in ('REQUEST_METHOD', 'SCRIPT_NAME', 'PATH_INFO', 'QUERY_STRING',
                                   'REMOTE_ADDR', 'HTTP_HOST', 'wsgi.url_scheme')).encode()]
'''
FIVE_MB = bytes(range(256)) * 256 * 80


@pytest.fixture(scope='module')
def site():
    """One nginx before two servers with the application SITE and one worker each: `.uwsgi` speaks uwsgi,
    `.http` HTTP. nginx's sites: uwsgi; unbuffered (bodies pass through it as they come, both ways);
    http (with kept connections); wrong (HTTP to the socket that speaks uwsgi)."""
    if NGINX is None:
        pytest.skip('nginx is not installed')
    with tempfile.TemporaryDirectory(prefix='mu') as name, contextlib.ExitStack() as stack:
        directory = pathlib.Path(name)
        directory.chmod(0o755)
        (directory / 'app.py').write_text(SITE)
        (directory / 'big').write_bytes(random.Random(1).randbytes(30 << 20))
        port, arguments = free_port(), ['--module', 'app:application']
        uwsgi = Server(directory, [*arguments, '--socket', 's'])
        stack.callback(uwsgi.end)
        http = Server(directory, [*arguments, '--http-socket', f'127.0.0.1:{port}'])
        stack.callback(http.end)
        uwsgi_pass = UWSGI.format(directory)
        front = Nginx(directory, {
            'uwsgi': uwsgi_pass,
            'unbuffered': f'uwsgi_request_buffering off; uwsgi_buffering off; {uwsgi_pass}',
            'http': KEPT,
            'wrong': f'location / {{ proxy_pass http://unix:{directory}/s; }}',
        }, f'large_client_header_buffers 4 64k; upstream kept {{ server 127.0.0.1:{port}; keepalive 4; }}\n')
        stack.callback(front.stop)
        front.uwsgi, front.http = uwsgi.ready(), http.ready()
        yield front


@pytest.mark.parametrize('way', ['uwsgi', 'unbuffered', 'http'])
class TestBehindNginx:
    """What a browser gets through nginx is what the application answered, whichever way nginx asks."""

    def test_a_get_is_answered(self, site, way):
        answer = site.ask(way)
        assert (answer.status, answer.content, answer.getheader('Content-Length')) == (200, b'hello\n', '6')

    def test_the_application_sees_the_browsers_request(self, site, way):
        host = 'kept' if way == 'http' else 'localhost'
        answer = site.ask(way, '/who?a=%20b&c', Host=host)
        assert answer.content.decode() == f'GET  /who a=%20b&c 127.0.0.1 {host} http'

    @pytest.mark.parametrize('size', [0, 10, 100_000, 3 << 20])
    def test_a_body_comes_back_as_it_was(self, site, way, size):
        body = random.Random(size).randbytes(size)
        answer = site.ask(way, '/echo', body)
        assert answer.status == 200 and answer.content == body

    def test_a_body_of_unknown_length_comes_back_as_it_was(self, site, way):
        answer = site.ask(way, '/echo', iter([b'a' * 5000, b'b' * 5000]))
        assert answer.content == b'a' * 5000 + b'b' * 5000

    def test_a_large_file_arrives_whole(self, site, way):
        sent = hashlib.sha256((site.directory.parent / 'big').read_bytes()).hexdigest()
        assert hashlib.sha256(site.ask(way, '/file').content).hexdigest() == sent

    def test_a_body_that_nobody_reads_never_makes_a_502(self, site, way):
        body = b'x' * (3 << 20)
        answers = [site.ask(way, '/unread', body) for _ in range(20)]
        assert {(answer.status, answer.content) for answer in answers} == {(401, b'no\n')}, site.log()

    @pytest.mark.parametrize('kind', ['list', 'generator'])
    def test_a_large_response_arrives_whole(self, site, way, kind):
        assert site.ask(way, f'/{kind}').content == FIVE_MB

    def test_head_204_and_304_have_no_body(self, site, way):
        head, empty, same = site.ask(way, '/list', method='HEAD'), site.ask(way, '/empty'), site.ask(way, '/same')
        assert (head.status, head.content, head.getheader('Content-Length')) == (200, b'', str(len(FIVE_MB)))
        assert (empty.status, empty.content, same.status, same.content) == (204, b'', 304, b'')
        assert same.getheader('ETag') == '"1"'
        assert site.ask(way, '/generator', method='HEAD').content == b''

    def test_thirty_kilobytes_of_cookies_pass(self, site, way):
        answer = site.ask(way, '/cookie', Cookie='; '.join(f'c{i}={"x" * 3000}' for i in range(10)))
        assert (answer.status, answer.content) == (200, b'30048'), answer.content

    @pytest.mark.parametrize('path, size', [('/cookie', 1), ('/hello', 6), ('/list', len(FIVE_MB))])
    def test_the_log_counts_the_bytes_of_each_response(self, site, way, path, size):
        for _ in 1, 2:
            site.ask(way, f'{path}?{way}', Cookie='x')
        server = site.http if way == 'http' else site.uwsgi
        assert f'=> generated {size} bytes' in server.wait_for(rf'{path}\?{way} ', 2)

    def test_a_slow_reader_holds_no_worker(self, site, way):
        with connect(('127.0.0.1', site.ports[way])) as slow:
            slow.sendall(b'GET /file HTTP/1.0\r\nHost: x\r\n\r\n')
            begun = slow.recv(100)
            assert all(site.ask(way).status == 200 for _ in range(5))           # from the only worker
            assert Answer(begun + read_all(slow)).body == (site.directory.parent / 'big').read_bytes()

    def test_a_browser_that_leaves_ends_its_request_alone(self, site, way):
        server = site.http if way == 'http' else site.uwsgi
        with connect(('127.0.0.1', site.ports[way])) as browser:
            browser.sendall(b'GET /endless?' + way.encode() + b' HTTP/1.0\r\nHost: x\r\n\r\n')
            assert browser.recv(100)[:12] == b'HTTP/1.1 200'
        server.wait_for(f'the endless one was closed for {way}$')
        server.wait_for(rf'/endless\?{way} .* 499\)')
        assert site.ask(way).status == 200


def test_nginx_keeps_its_connections_to_an_http_socket(site):
    ports = [site.ask('http', '/port').content for _ in range(100)]
    assert all(ports) and len(set(ports)) <= 4


def test_connections_that_nginx_keeps_do_not_hold_up_a_stop(start, nginx, tmp):
    server = start(ini='socket = s\nworker-reload-mercy = 15', http=True)
    front = nginx({'site': KEPT},
                  'upstream kept { server 127.0.0.1:%d; keepalive 4; }' % server.http[1])
    assert front.ask('site').status == 200
    assert server.stop() == 0 and 'killed' not in server.log


def test_a_stop_amid_a_reload_is_a_clean_end(start):
    for _ in range(5):
        server = start(ini='processes = 4')
        server.kill(signal.SIGHUP)
        server.wait_for('reloaded')
        assert server.stop() == 0


def test_proxy_pass_to_a_uwsgi_socket_is_explained_in_the_browser(site):
    answer = site.ask('wrong')
    assert answer.status == 400 and b'in nginx use uwsgi_pass, not proxy_pass' in answer.content
    site.uwsgi.wait_for('bad request: .*use uwsgi_pass')


def test_a_socket_that_nginx_may_not_open_is_a_502_with_permission_denied(start, nginx, tmp):
    if os.getuid():
        pytest.skip('only root can run nginx as another user')
    start()
    front = nginx({'site': UWSGI.format(tmp)}, user='nobody nogroup')
    assert front.ask('site').status == 502
    assert f'connect() to unix:{tmp}/s failed (13: Permission denied)' in front.log()
    os.chown(tmp / 's', -1, grp.getgrnam('nogroup').gr_gid)                     # as chown-socket would
    assert front.ask('site').status == 200


@pytest.mark.parametrize('way', ['uwsgi', 'http'])
def test_three_reloads_under_load_lose_no_request(start, nginx, tmp, way):
    server = start(ini='processes = 2' if way == 'uwsgi' else 'processes = 2\nsocket = s2', http=way == 'http')
    front = nginx({'site': UWSGI.format(tmp) if way == 'uwsgi' else
                   KEPT},
                  f'upstream kept {{ server 127.0.0.1:{server.http[1] or 1}; keepalive 4; }}')
    over = threading.Event()
    found, running = front.load('site', 4, over, most=20_000)
    for i in range(3):
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', i + 2)
    over.set()
    for thread in running:
        thread.join(PATIENCE)
    assert len(found) > 100 and set(found) == {200}, [f for f in found if f != 200][:3] + [front.log()[-2000:]]


def test_one_of_three_servers_dies_and_one_reloads_and_no_request_fails(tmp, nginx):
    (tmp / 'app.py').write_text(HELLO)
    ports = [free_port() for _ in range(3)]
    servers = [Server(tmp, ['--module', 'app:application', '--processes', '2', '--socket', f'127.0.0.1:{port}'])
               for port in ports]
    try:
        for server in servers:
            server.ready()
        upstream = ' '.join(f'server 127.0.0.1:{port};' for port in ports)
        location = 'location / { include uwsgi_params; uwsgi_pass three; uwsgi_next_upstream error timeout; }'
        front = nginx({'site': location}, f'upstream three {{ {upstream} }}')
        over = threading.Event()
        found, running = front.load('site', 4, over, most=20_000)
        wait_until(lambda: len(found) > 100, 'the load')
        servers[0].kill(signal.SIGKILL)
        servers[1].kill(signal.SIGHUP)
        servers[1].wait_for('^ready', 2)
        before = len(found)
        wait_until(lambda: len(found) > before + 100, 'the load')
        over.set()
        for thread in running:
            thread.join(PATIENCE)
        assert set(found) == {200}, [f for f in found if f != 200][:3] + [front.log()[-2000:]]
    finally:
        for server in servers:
            server.end()


CUSTOMERS_INI = '''
[uwsgi]
module = {module}
master = true
processes = 4
socket = {tmp}/minuwsgi.sock
chmod-socket = 660
vacuum = true
die-on-term = true
'''


@pytest.fixture
def serve_both_ways(tmp, nginx):
    """serve_both_ways(module): the customer's ini behind nginx. {'uwsgi': URL through nginx, 'http': URL of
    an http-socket}."""
    servers = []

    def serve(module):
        (tmp / 'customer.ini').write_text(CUSTOMERS_INI.format(module=module, tmp=tmp))
        port = free_port()
        servers.append(Server(tmp, ['customer.ini', '--http-socket', f'127.0.0.1:{port}']).ready())
        front = nginx({'site': f'location / {{ include uwsgi_params; uwsgi_pass unix:{tmp}/minuwsgi.sock; }}'})
        return {'uwsgi': front.url('site', ''), 'http': f'http://127.0.0.1:{port}'}
    yield serve
    for server in servers:
        server.end()
        assert not (tmp / 'minuwsgi.sock').exists()


class Browser:
    """Keeps cookies and follows redirects."""

    def __init__(self, base):
        self.base, self.cookies = base, http.cookiejar.CookieJar()
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}),
                                                  urllib.request.HTTPCookieProcessor(self.cookies))

    def cookie(self, name):
        return next((cookie.value for cookie in self.cookies if cookie.name == name), None)

    def get(self, path, data=None, **headers):
        """(status, URL in the end, body); a dict is posted as a form."""
        data = urllib.parse.urlencode(data).encode() if isinstance(data, dict) else data
        request = urllib.request.Request(self.base + path, data, {n.replace('_', '-'): v for n, v in headers.items()})
        try:
            with self.opener.open(request, timeout=PATIENCE) as answer:
                return answer.status, answer.url, answer.read()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.url, answer.read()

    def upload(self, path, content, **headers):
        """Post a form with a file, as a browser does."""
        head = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n' \
               b'Content-Type: application/octet-stream\r\n\r\n'
        headers['Content_Type'] = 'multipart/form-data; boundary=XX'
        return self.get(path, head + content + b'\r\n--XX--\r\n', **headers)


DJANGO_URLS = '''
import hashlib
from django.contrib import admin
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.urls import path

def upload(request):
    return HttpResponse(hashlib.sha256(request.FILES['file'].read()).hexdigest())

def stream(request):
    return StreamingHttpResponse(f'line {i}\\n' for i in range(1000))

def download(request):
    return FileResponse(open('big', 'rb'))

urlpatterns = [path('admin/', admin.site.urls), path('upload', upload), path('stream', stream),
               path('download', download)]
'''


def test_django_logs_in_uploads_streams_and_downloads(tmp, serve_both_ways):
    pytest.importorskip('django')
    manage = [sys.executable, 'manage.py']
    for command in ([sys.executable, '-m', 'django', 'startproject', 'shop', '.'], [*manage, 'migrate', '-v0'],
                    [*manage, 'createsuperuser', '--noinput', '--username', 'admin', '--email', 'a@localhost']):
        subprocess.run(command, cwd=tmp, check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, 'DJANGO_SUPERUSER_PASSWORD': 'a secret'})
    with open(tmp / 'shop' / 'settings.py', 'a') as settings:
        settings.write("\nDEBUG = False\nALLOWED_HOSTS = ['*']\n")
    (tmp / 'shop' / 'urls.py').write_text(DJANGO_URLS)
    (tmp / 'big').write_bytes(FIVE_MB)
    for way, base in serve_both_ways('shop.wsgi:application').items():
        browser = Browser(base)
        form = {'username': 'admin', 'password': 'a secret', 'next': '/admin/'}
        assert browser.get('/admin/login/', form)[0] == 403, way                # no CSRF token
        status, url, page = browser.get('/admin/')
        assert status == 200 and '/admin/login/?next=/admin/' in url and b'csrfmiddlewaretoken' in page
        token = re.search(b'name="csrfmiddlewaretoken" value="([^"]+)"', page)[1].decode()
        status, url, page = browser.get('/admin/login/', {**form, 'csrfmiddlewaretoken': token})
        assert status == 200 and url.endswith('/admin/') and b'Site administration' in page, page
        content = random.Random(2).randbytes(3 << 20)
        status, _, page = browser.upload('/upload', content, X_CSRFToken=browser.cookie('csrftoken'))
        assert (status, page.decode()) == (200, hashlib.sha256(content).hexdigest())
        assert browser.get('/stream')[2] == b''.join(b'line %d\n' % i for i in range(1000))
        assert browser.get('/download')[2] == FIVE_MB


FLASK_APP = '''
import hashlib
from flask import Flask, request, send_file, session

app = Flask(__name__)
app.secret_key = 'for the test'

@app.route('/')
def count():
    session['count'] = session.get('count', 0) + 1
    return f"visit {session['count']}"

@app.route('/upload', methods=['POST'])
def upload():
    return hashlib.sha256(request.files['file'].read()).hexdigest()

@app.route('/download')
def download():
    return send_file('big', mimetype='application/octet-stream', conditional=True)
'''


def test_flask_keeps_a_session_uploads_and_downloads(tmp, serve_both_ways):
    pytest.importorskip('flask')
    (tmp / 'shop.py').write_text(FLASK_APP)
    (tmp / 'big').write_bytes(FIVE_MB)
    for way, base in serve_both_ways('shop:app').items():
        browser = Browser(base)
        assert [browser.get('/')[2] for _ in range(3)] == [b'visit 1', b'visit 2', b'visit 3'], way
        content = random.Random(3).randbytes(3 << 20)
        status, _, page = browser.upload('/upload', content)
        assert (status, page.decode()) == (200, hashlib.sha256(content).hexdigest())
        assert browser.get('/download')[2] == FIVE_MB
        status, _, part = browser.get('/download', Range='bytes=1000-1999')     # Range is the application's business
        assert (status, part) == (206, FIVE_MB[1000:2000])
        assert browser.get('/nowhere')[0] == 404


# ---------------------------------------------------------------------------------------------
# 12b. In a hostile world: bytes, clients and machines as bad as they get

FUZZED = """
def application(environ, start_response):
    body = environ['wsgi.input'].read() if 'HTTP_READ' in environ else b''
    out = repr(({k: v for k, v in environ.items() if type(v) is str}, body)).encode()
    start_response('200 OK', [('Content-Length', str(len(out)))])
    return [out]
"""
FUZZED_INI = 'disable-logging = true\nlimit-post = 1000000\nprocesses = 2'
LENGTHS = ['-5', '+5', ' 5', '5 ', '0x5', '5.0', '1e3', '\xb2', '9' * 18, '9' * 30, '', '0',
           '00005', '5', '2000000', '5\0']
MUTATIONS = ('whole', 'size', 'cut', 'no value', 'length', 'twice', 'one byte', 'odd', 'content-length', 'modifier',
             'flip')


def packet_mutation(chance):
    """(bytes, shall they be sent one by one)"""
    body = bytes(chance.choices(b'ab\0\r\n', k=chance.choice((0, 0, 5, 300))))
    items = [(b'QUERY_STRING', b''), (b'REQUEST_METHOD', b'POST' if body else b'GET'), (b'REQUEST_URI', b'/a'),
             (b'CONTENT_LENGTH', b'%d' % len(body) if body else b''), (b'PATH_INFO', b'/a'), (b'HTTP_HOST', b'x')]
    if chance.random() < 0.5:
        items.append((b'HTTP_READ', b'1'))
    what = chance.choice(MUTATIONS)
    if what == 'twice':
        items += chance.choices(items, k=3)
    elif what == 'odd':
        for _ in range(3):
            items[chance.randrange(len(items))] = tuple(
                bytes(chance.choices(b'A\0\xff\r\n_=\xe4 ', k=chance.choice((1, 9, 300)))) for _ in range(2))
    elif what == 'content-length':
        items[3] = b'CONTENT_LENGTH', chance.choice(LENGTHS).encode('latin-1')
        if chance.random() < 0.2:
            items.append((b'CONTENT_LENGTH', chance.choice(LENGTHS).encode('latin-1')))
    data = bytearray(block(*(text for item in items for text in item)))
    if what == 'one byte':
        data = bytearray(b''.join(b'\1\0%c\1\0%c' % tuple(chance.choices(range(256), k=2)) for _ in range(91)) * 120)
    elif what == 'no value':
        data += block(b'HTTP_LAST')
    elif what == 'length':
        at = 0
        for _ in range(chance.randrange(2 * len(items))):
            at += 2 + int.from_bytes(data[at:at + 2], 'little')
        data[at:at + 2] = chance.choice((0, 1, 255, 256, 65535, chance.randrange(65536))).to_bytes(2, 'little')
    size = len(data) if what != 'size' else chance.choice((0, 1, len(data) - 1, len(data) + 1, chance.randrange(65536)))
    data = bytearray(frame(bytes(data), chance.randrange(256) if what == 'modifier' else 0, size) + body)
    for _ in range(chance.randint(1, 4) if what == 'flip' else 0):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if what == 'cut' or chance.random() < 0.02:
        del data[chance.randrange(len(data)):]
    return bytes(data), len(data) < 1000 and chance.random() < 0.05


def send_packet(server, case):
    """Send a packet whole or byte by byte, and the end of our side; all that the server answers."""
    data, slowly = case
    with connect(server.socket) as connection:
        with contextlib.suppress(OSError):              # it has closed already
            for i in range(len(data) if slowly else 0):
                connection.sendall(data[i:i + 1])
            connection.sendall(b'' if slowly else data)
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def judge_packet(case, raw):
    """Compare an answer with what the plain reader finds in the packet."""
    data, end = case[0], 4 + int.from_bytes(case[0][1:3], 'little')
    answer, found = Answer(raw), None
    if not raw:                                         # the client seems to have left amid the packet or its body
        if data[:1] not in (b'', b'\0', b'\x1e') or len(data) < end:
            return 'closed, the packet is not whole'
    else:
        assert answer.status in ('200 OK', '400 Bad Request', '411 Length Required', '413 Content Too Large') or \
            data[:3] == b'\x64\0\0' or data[0] == 100 and raw == b'\x64\0\0\1', 'status'
    if data[:1] == b'\x64':
        assert raw == b'\x64\0\0\1'
        return 'ping'
    found = read_plainly(data[:end]) if data[0] in (0, 30) and len(data) >= end > 4 else None
    if found is None:
        assert answer.status == '400 Bad Request' and answer.text.startswith('400 Bad Request: '), 'it is bad'
        return '400 ' + answer.text[17:29]
    found, _ = found
    length = found.get('CONTENT_LENGTH', '')
    if length and not (length.isascii() and length.isdecimal() and len(length) < 19):
        assert answer.status == '400 Bad Request' and 'Content-Length' in answer.text, 'its length is bad'
        return '400 Content-Length'
    if int(length or 0) > 1000000:
        assert answer.status == '413 Content Too Large'
        return '413'
    if 'HTTP_TRANSFER_ENCODING' in found and not length:
        assert answer.status == '411 Length Required'
        return '411'
    if 'HTTP_READ' in found and int(length or 0) > len(data) - end:
        assert not raw, 'its body is not whole'
        return 'closed, the body is not whole'
    assert answer.status == '200 OK', 'it is good'
    if found.get('REQUEST_METHOD') == 'HEAD':
        assert not answer.body
        return '200 to HEAD'
    environ, body = ast.literal_eval(answer.body.decode())
    assert body == (data[end:end + int(length or 0)] if 'HTTP_READ' in found else b''), 'the body'
    del found['base']
    assert {key: environ.get(key) for key in found} == found, 'the environ'
    return '200'


def descriptors(server):
    """How many each worker has."""
    return {pid: len(os.listdir(f'/proc/{pid}/fd')) for pid in server.workers()}


def fuzz_packets(server, seeds):
    """Send mutated packets; the server must be as it was before. (kinds of answers, failures)"""
    began, before = time.monotonic(), descriptors(server)
    kinds, failures = fuzz(seeds, packet_mutation, lambda case: send_packet(server, case), judge_packet)
    wait_until(lambda: descriptors(server) == before, f'{before}')
    took = time.monotonic() - began
    causes = collections.Counter(line[:25] for line in server.lines if line.startswith(('bad', '? ?', 'GET', 'POST')))
    if failures or 'Traceback' in server.log or len(causes) > 20 or max(causes.values(), default=0) > 2 * (took + 2):
        failures.append(f'{causes} in {took:.1f} s; the log ends with {server.log[-2000:]}')
    return kinds, failures


class TestBadBytes:
    """Whatever is sent, it is answered in words or closed, costs no worker and no descriptor, and little log."""

    def test_mutations_of_a_packet_get_the_right_answer_or_a_close(self):
        """python3 test_minuwsgi.py --fuzz 50000 [SEED] for more; a failure names its seed."""
        with running(FUZZED, FUZZED_INI) as server:
            kinds, failures = fuzz_packets(server, range(300))
        assert failures == [] and len(kinds) > 8


    def test_a_packet_cut_at_any_byte_is_closed_and_nothing_else(self, shared):
        server, data = shared(ENVIRON_APP), packet('/a')
        for size in range(len(data)):
            assert send_packet(server, (data[:size], False)) == b''
        assert server.ask().status == '200 OK'

    def test_a_flood_of_bad_requests_is_a_line_a_second_and_the_rest_is_counted(self, start):
        server = start(ini='disable-logging = true')
        began = time.monotonic()
        for _ in range(300):
            assert exchange(server.socket, frame(b'')).startswith(b'HTTP/1.1 400')
            assert send_packet(server, (packet()[:100], False)) == b''
        took = time.monotonic() - began
        assert len([line for line in server.lines if 'the client closed' in line]) <= took + 2
        select.select([], [], [], 1.1)                  # the second is over, the next one tells
        exchange(server.socket, frame(b''))
        server.wait_for(r'\(and \d+ more like it\)$')
        lines = [line for line in server.lines if line.startswith('bad request: an empty request')]
        assert len(lines) <= took + 3
        assert len(lines) + sum(int(number) for number in re.findall(r'\(and (\d+) more', '\n'.join(lines))) == 301


HOSTILE = """
import time
count = [0]
def reply(body, s):
    s('200 OK', [('Content-Length', str(len(body)))]); return [body]
def hello(e, s):
    return reply(b'hello\\n', s)
def body(e, s):
    return reply(b'%d' % len(e['wsgi.input'].read()), s)
def late(e, s):
    time.sleep(0.1); return body(e, s)
def drip(e, s):
    s('200 OK', [])
    for _ in range(100): yield b'x' * 100000
def big(e, s):
    s('200 OK', []); return [b'x' * 10000000]
def nap(e, s):
    time.sleep(0.2); return hello(e, s)
def counted(e, s):
    count[0] += 1; return reply(b'%d' % count[0], s)
def memory(e, s):
    eaten = []
    while True: eaten.append(b'x' * 1000000)
def say(e, s):
    import sys
    print('printed', '.' * 500); print('to stderr', '.' * 500, file=sys.stderr)
    e['wsgi.errors'].write('to wsgi.errors\\n'); return hello(e, s)
def application(e, s):
    return globals()[e['PATH_INFO'][1:] or 'hello'](e, s)
"""


def send_and_leave(address, data, hard, after=0):
    """Connect, send, read so many bytes, leave: by an end of our side, or hard, by a reset (over TCP)."""
    with connect(address) as connection:
        if hard:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        connection.sendall(data)
        while after > 0:
            after -= len(connection.recv(after))


def speaking(server, speaks, path='/', body=b'', length=None):
    """(address, request) over uwsgi or HTTP, with a body that may be shorter than its length."""
    length = len(body) if length is None else length
    if speaks == 'uwsgi':
        return server.socket, packet(path, CONTENT_LENGTH=str(length or '')) + body
    lines = f'GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n'
    return server.http, lines.encode() + body


both = pytest.mark.parametrize('speaks', ['uwsgi', 'http'])


class TestBadClients:
    """Who leaves, sleeps, dribbles or comes a thousand times at once holds a worker as long as socket-timeout says."""

    @both
    def test_a_thousand_clients_at_once_are_answered_by_two_workers(self, start, speaks):
        server = start(HOSTILE, 'processes = 2\ndisable-logging = true', http=speaks == 'http')
        address, request = speaking(server, speaks)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(address)) for _ in range(1000)]
            for client in clients:
                client.sendall(request)
            assert all(Answer(read_all(client)).body == b'hello\n' for client in clients)

    @pytest.mark.parametrize('speaks, tcp', [('uwsgi', False), ('uwsgi', True), ('http', True)])
    def test_a_client_gone_at_any_stage_costs_nothing(self, start, speaks, tcp):
        port = free_port()
        server = start(HOSTILE, 'processes = 2\ndisable-logging = true\nsocket-timeout = 1\n'
                       f'socket = {f"127.0.0.1:{port}" if tcp else "s"}', http=speaks == 'http')
        server.socket = ('127.0.0.1', port) if tcp else server.socket
        stages = {name: (*speaking(server, speaks, *arguments), after) for name, after, arguments in (
            ('before', 0, ()), ('head', 0, ()), ('body', 0, ('/body', b'x', 100000)),
            ('unread', 0, ('/', b'x', 100000)), ('running', 0, ('/nap',)),
            ('response', 1000, ('/drip',)), ('offload', 1000, ('/big',)), ('unheard', 0, ('/big',)))}
        stages['before'], stages['head'] = (stages['before'][0], b'', 0), (stages['head'][0], stages['head'][1][:20], 0)
        before = descriptors(server)
        for _ in range(3):
            for address, data, after in stages.values():
                for hard in (False, True):
                    send_and_leave(address, data, hard, after)
            assert Answer(exchange(*speaking(server, speaks))).body == b'hello\n'
        wait_until(lambda: descriptors(server) == before, f'{before}')
        assert 'Traceback' not in server.log and 'the application failed' not in server.log

    def test_a_connection_that_is_reset_before_it_is_read_is_no_failure(self, start):
        with socket.create_server(('127.0.0.1', 0)) as listener:        # one that doesn't wait for the first bytes
            server = start(HOSTILE, f'socket = fd://{listener.fileno()}', pass_fds=[listener.fileno()])
            for _ in range(20):
                send_and_leave(listener.getsockname(), b'', True)
            assert Answer(exchange(listener.getsockname(), packet())).body == b'hello\n'
        assert 'the application failed' not in server.log

    def test_who_leaves_before_it_is_told_to_continue_is_no_failure(self, start):
        server = start(HOSTILE, http=True)
        send_and_leave(server.http, b'POST /late HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n'
                       b'Expect: 100-continue\r\n\r\n', True)
        assert server.get().body == b'hello\n' and 'the application failed' not in server.log

    @both
    def test_a_client_that_has_ended_its_side_is_answered(self, start, speaks):
        server = start(HOSTILE, http=speaks == 'http')
        for path, size in ('/', 6), ('/nap', 6), ('/big', 10000000), ('/drip', 10000000):
            address, data = speaking(server, speaks, path)
            with connect(address) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                raw = read_all(connection)
            assert len(raw) >= size and raw.startswith(b'HTTP/1.1 200 OK')

    @pytest.mark.parametrize('ini', ['', 'http-socket = t'])
    def test_requests_whose_client_has_gone_are_skipped(self, start, tmp, ini):
        server = start(HOSTILE, f'socket = s\n{ini}\ndisable-logging = true')
        server.http = str(tmp / 't')
        speaks = 'http' if ini else 'uwsgi'
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(speaking(server, speaks)[0])) for _ in range(40)]
            for i, client in enumerate(clients):
                client.sendall(speaking(server, speaks, '/counted' if i else '/nap')[1])
                if i == 0:
                    select.select([], [], [], 0.1)
            for client in clients[1::2]:                # every other one has had enough
                client.close()
            for client in clients[::2]:
                assert Answer(read_all(client)).status == '200 OK'
        assert 20 <= int(server.ask('/counted').body) <= 25         # 39 without; a slow machine closes some too late

    def test_requests_whose_client_has_gone_are_skipped_at_a_stop_too(self, start, tmp):
        os.mkfifo(tmp / 'fifo')
        server = start("""
def application(e, s):
    if e['PATH_INFO'] == '/held':
        print('held')
        open('fifo').read()
    s('200 OK', [('Content-Length', '0')])
    return [b'']
""")
        with connect(server.socket) as held, connect(server.socket) as waiting:
            held.sendall(packet('/held'))
            server.wait_for('^held')
            for _ in range(3):
                send_and_leave(server.socket, packet('/gone'), False)
            waiting.sendall(packet('/waiting'))
            server.kill(signal.SIGTERM)
            server.wait_for('stopping')
            select.select([], [], [], 0.2)              # what is quick makes nobody leave
            (tmp / 'fifo').write_text('go on')
            assert Answer(read_all(waiting)).status == '200 OK'
        assert server.wait() == 0
        assert '/waiting' in server.log and '/gone' not in server.log

    def test_who_is_slow_holds_a_worker_for_the_timeout_and_who_is_steady_is_served(self, start):
        """A byte now and then, in the head or the body; nothing read of a response, or a little: a worker for each."""
        server = start(HOSTILE, 'socket-timeout = 1\nprocesses = 8', http=True)
        kinds = (server.socket, packet('/body', CONTENT_LENGTH='9000'), b'x'), (server.socket, packet()[:30], b'\0'), \
            (*speaking(server, 'http', '/body', length=9000), b'x'), (server.socket, packet('/drip'), b'')
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            def connected(address, data):
                connection = stack.enter_context(connect(address))
                connection.sendall(data)
                return connection
            slow = {connected(address, data): (then, ticks) for address, data, then in kinds for ticks in (1, 7)}
            steady = connected(server.socket, packet('/body', CONTENT_LENGTH='1500'))
            senders, tick = [connection for connection, (then, _) in slow.items() if then], 0
            while senders or tick < 15:
                assert time.monotonic() - began < 4
                tick += 1
                select.select([], [], [], 0.1)
                for connection, (then, ticks) in slow.items():
                    if tick % ticks == 0:
                        with contextlib.suppress(OSError):
                            connection.sendall(then) if then else connection.recv(10)
                if tick <= 15:
                    steady.sendall(b'x' * 100)
                senders = [one for one in senders if one not in select.select(senders, [], [], 0)[0]]
            assert Answer(read_all(steady)).body == b'1500'
            for connection, (then, _) in slow.items():
                raw = read_all(connection)
                assert not raw if then else len(raw) < 10000000
        assert server.ask().body == b'hello\n'


def test_who_sends_until_the_deadline_and_then_nothing_holds_no_worker(start):
    server = start(HOSTILE, 'socket-timeout = 1')
    for head in b'\0\xff\xf0\0', packet('/body', CONTENT_LENGTH='100000'):
        with connect(server.socket) as connection:
            connection.sendall(head)
            until = time.monotonic() + 1.5
            with contextlib.suppress(OSError):
                while time.monotonic() < until:
                    connection.sendall(b'x')
                    time.sleep(0.0005)
            with contextlib.suppress(OSError):
                assert b'200 OK' not in read_all(connection)
        assert server.ask().body == b'hello\n'


def test_who_reads_slowly_but_steadily_is_served(start):
    """Though a socket counts as writable only when MBs of it are free."""
    server = start(HOSTILE, 'socket-timeout = 1', http=True)
    with connect(server.http) as connection:
        connection.sendall(b'GET /drip HTTP/1.0\r\nHost: x\r\n\r\n')
        for _ in range(100):
            assert connection.recv(10000)
            time.sleep(0.025)
    assert 'too slow' not in server.log


def test_a_client_that_vanishes_is_no_failure_of_the_application(tmp):
    if subprocess.call(['unshare', '-n', 'ip', 'link'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        pytest.skip('needs unshare and ip, and to be root')
    (tmp / 'app.py').write_text("""
import time
def application(e, s):
    s('200 OK', [])
    while True:
        yield b'x'
        time.sleep(0.05)
""")
    script = f"""
        ip link set lo up
        echo 1 > /proc/sys/net/ipv4/tcp_retries2
        {sys.executable} -m minuwsgi app.py --http-socket 127.0.0.1:8000 2>&1 &
        until grep -q :1F40 /proc/net/tcp; do sleep 0.05; done
        exec 3<>/dev/tcp/127.0.0.1/8000
        printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3
        head -c 100 <&3 >/dev/null
        ip link set lo down
        wait -n
        """
    with subprocess.Popen(['unshare', '-n', '--pid', '--fork', '--kill-child', 'bash', '-c', script], cwd=tmp,
                          env={**os.environ, **COMPILED}, stdout=subprocess.PIPE) as process:
        try:
            seen = [next(process.stdout)]
            while b'generated' not in seen[-1]:
                seen.append(next(process.stdout))
        finally:
            process.kill()
    assert b' 499)' in seen[-1] and not [line for line in seen if b'Traceback' in line]


@pytest.fixture
def tiny_disk(tmp):
    """A file system of 64 KiB."""
    place = tmp / 'disk'
    place.mkdir()
    if subprocess.call(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', str(place)], stderr=subprocess.DEVNULL):
        pytest.skip('a small file system can not be mounted here')
    yield place
    subprocess.check_call(['umount', '-l', str(place)])


LOGS = {'pipe': os.pipe, 'socket': lambda: [one.detach() for one in socket.socketpair()], 'terminal': os.openpty}


@pytest.fixture
def unread(tmp):
    """unread(kind, *arguments): a server whose log nobody reads until the test does; (process, log)."""
    processes = []

    def unread(kind, *arguments):
        (tmp / 'app.py').write_text(HOSTILE)
        ours, theirs = LOGS[kind]()
        process = subprocess.Popen([sys.executable, str(MINUWSGI), '--module', 'app', *arguments], cwd=tmp,
                                   stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
        processes.append((process, ours))
        wait_until(lambda: children(process.pid), 'the worker')
        if kind == 'terminal':
            os.write(ours, b'\x13')                     # Ctrl-S
        os.close(theirs)
        return process, ours
    yield unread
    for process, ours in processes:
        left = children(process.pid)
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            os.close(ours)
        wait_until(lambda: not any(alive(pid) for pid in left), 'the end of the workers')


def read_waiting(fd):
    """What can be read without waiting."""
    data = b''
    while select.select([fd], [], [], 0.05)[0]:
        data += os.read(fd, 1 << 20)
    return data.decode(errors='replace')


class TestBadMachine:
    """No descriptors, no memory, no disk, no /proc, no end of signals, nobody who reads the log: it goes on."""

    def test_with_32_descriptors_it_goes_on_and_reloads(self, start, tmp):
        import resource
        server = start(HOSTILE, 'processes = 2\nstats = stats\nstats-http = true', http=True,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)))
        with contextlib.ExitStack() as stack:
            for i in range(70):                         # more than two workers have descriptors
                address, data = speaking(server, 'http' if i % 2 else 'uwsgi', '/big')
                stack.enter_context(connect(address)).sendall(data)
            server.wait_for('accept: Too many open files')
            for _ in range(40):                         # more than the master has
                stack.enter_context(connect(str(tmp / 'stats')))
            wait_until(lambda: len(os.listdir(f'/proc/{server.pid}/fd')) == 32, 'the last descriptor')
            os.kill(server.workers()[0], signal.SIGKILL)
            server.wait_for('Too many open files; the next try comes in 1 s')
            server.kill(signal.SIGHUP)
            server.wait_for('reload: failed')
        server.kill(signal.SIGHUP)
        server.wait_for('^ready', 2)
        for _ in range(20):
            assert server.ask().body == b'hello\n'
        assert len(re.findall('accept: ', server.log)) < 10

    def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(self, start, tiny_disk):
        server = start(HOSTILE, f'logto = {tiny_disk}/log\npidfile = {tiny_disk}/pid', ready=False)
        log = tiny_disk / 'log'
        wait_until(lambda: log.exists() and '\nready' in log.read_text(), 'ready')
        with open(tiny_disk / 'full', 'wb', buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b'x' * 100):
                pass
        for _ in range(50):
            assert server.ask('/say').body == b'hello\n'
        code, output = run(tiny_disk, '--socket', '@mu-full', '--module', 'minuwsgi:demo', '--pidfile', 'other')
        assert code == 1 and "other: can't write it: No space left on device" in output and 'Traceback' not in output
        server.kill(signal.SIGHUP)
        wait_until(lambda: server.ask('/counted').body == b'1', 'the new worker')
        (tiny_disk / 'full').unlink()
        server.ask()
        wait_until(lambda: re.search(r'log: \d+ lines were lost here', log.read_text()), 'the count')
        assert (tiny_disk / 'pid').read_text() == f'{server.pid}\n' and server.stop() == 0

    def test_a_log_on_a_full_device_does_not_matter(self, start):
        server = start(HOSTILE, 'logto = /dev/full', ready=False)
        with socket.socket(socket.AF_UNIX) as probe:
            wait_until(lambda: not probe.connect_ex(server.socket), 'the socket')
        for _ in range(10):
            assert server.ask('/say').body == b'hello\n'
        assert server.stop() == 0

    def test_an_application_without_memory_gives_a_500_and_the_next_request_is_served(self, start):
        server = start(HOSTILE, 'limit-as = 200')
        server.tracebacks_expected = True
        for _ in range(3):
            assert server.ask('/memory').raw[:12] in (b'HTTP/1.1 500', b'')
            assert server.ask().body == b'hello\n'
        assert 'MemoryError' in server.log or 'died' in server.log

    @pytest.mark.parametrize('what', ['no /proc and no /dev/shm', 'read-only'])
    def test_it_serves_and_reloads_with_less_of_a_system(self, tmp, what):
        if os.getuid() or subprocess.call(['unshare', '--mount', 'true'], stderr=subprocess.DEVNULL):
            pytest.skip('nothing can be mounted here')
        (tmp / 'app.py').write_text(HOSTILE)
        mounts = f'mount --bind {tmp} {tmp} && mount -o remount,ro,bind {tmp}' if what == 'read-only' else \
            'mount -t tmpfs none /dev/shm && mount -t tmpfs none /proc'
        port = free_port()
        process = subprocess.Popen(
            ['unshare', '--mount', 'sh', '-c', f'{mounts} && exec "$@"', 'sh', sys.executable, str(MINUWSGI),
             '--module', 'app', '--socket', f'127.0.0.1:{port}', '--reload-on-rss', '1000', '--processes', '2',
             '--auto-procname', '--harakiri', '9', '--stats', f'@{tmp.name}'],
            cwd=tmp, stderr=subprocess.PIPE)
        try:
            for turn in range(2):
                for line in process.stderr:
                    assert b'Traceback' not in line
                    if line.startswith(b'ready'):
                        break
                for _ in range(5):
                    assert ask(('127.0.0.1', port)).body == b'hello\n'
                assert json.loads(read_all(connect(f'\0{tmp.name}')))['workers'][0]['pid']
                process.send_signal(signal.SIGHUP)
            for option in ['--socket', 's'], ['--pidfile', 'p', '--socket', f'@{tmp.name}-']:
                if what == 'read-only':
                    command = f'{mounts} && exec {sys.executable} {MINUWSGI} --module app {" ".join(option)}'
                    done = subprocess.run(['unshare', '--mount', 'sh', '-c', command], cwd=tmp, timeout=PATIENCE,
                                          stderr=subprocess.PIPE)
                    assert done.returncode == 1 and b'Read-only file system' in done.stderr
                    assert b'Traceback' not in done.stderr
        finally:
            process.terminate()
            rest = process.stderr.read()
            process.stderr.close()
            assert process.wait(PATIENCE) == 0 and b'Traceback' not in rest

    def test_a_signal_every_millisecond_loses_no_request(self, start, tmp):
        server = start(HOSTILE, 'processes = 2\nlogto = log', ready=False)
        wait_until(lambda: (tmp / 'log').exists() and '\nready' in (tmp / 'log').read_text(), 'ready')
        targets = [server.pid, *server.workers()]
        load, sent = Load(server, '/hello'), 0
        big = Load(server, '/big', 1)
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            for pid in targets:
                for number in signal.SIGCHLD, signal.SIGUSR1, signal.SIGCONT, signal.SIGWINCH:
                    os.kill(pid, number)
            sent += 1
            select.select([], [], [], 0.001)
        assert load.end() == [] == big.end()
        assert load.answered > 50 and big.answered and sent > 50
        assert [server.pid, *server.workers()] == targets

    def test_a_log_that_nobody_reads_hangs_nobody(self, unread, tmp):
        """It costs a worker a second, and so the master; what is lost meanwhile is told later."""
        def live_with(kind):
            address, slow = str(tmp / kind), 0
            process, log = unread(kind, '--socket', address)
            for i in range(400):
                began = time.monotonic()
                assert ask(address, f'/say?{"x" * 500}').body == b'hello\n'
                slow += time.monotonic() - began > 0.5
            assert slow <= 1
            worker, = children(process.pid)
            os.kill(process.pid, signal.SIGUSR2)        # nor does it write its stack then
            assert ask(address).body == b'hello\n'
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: children(process.pid) not in ([], [worker]), 'a new worker')
            os.kill(process.pid, signal.SIGHUP)
            wait_until(lambda: ask(address, '/counted').body == b'1', 'the reload')
            if kind == 'terminal':
                os.write(log, b'\x11')                  # Ctrl-Q
            wait_until(lambda: ask(address).body == b'hello\n' and 'lines were lost here' in read_waiting(log), kind)
            process.terminate()
            assert process.wait(PATIENCE) == 0
        with concurrent.futures.ThreadPoolExecutor() as at_once:
            list(at_once.map(live_with, LOGS))

    def test_nothing_takes_the_place_of_a_log_that_was_closed_before_the_start(self, tmp):
        (tmp / 'app.py').write_text(HOSTILE)
        command = ['sh', '-c', f'exec {sys.executable} {MINUWSGI} --module app --socket s --pidfile p <&- >&- 2>&-']
        process = subprocess.Popen(command, cwd=tmp)
        try:
            wait_until(lambda: children(process.pid), 'the worker')
            for pid in process.pid, children(process.pid)[0]:
                assert [os.readlink(f'/proc/{pid}/fd/{fd}') for fd in range(3)] == ['/dev/null'] * 3
            assert ask(str(tmp / 's'), '/say').raw == b'HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n'
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0

    def test_a_log_that_is_closed_hangs_nobody(self, unread, tmp):
        process, log = unread('pipe', '--socket', 's')
        os.close(log)
        for _ in range(50):
            assert ask(str(tmp / 's'), '/say').body == b'hello\n'
        worker, = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: children(process.pid) not in ([], [worker]), 'a new worker')
        os.kill(process.pid, signal.SIGHUP)
        wait_until(lambda: ask(str(tmp / 's'), '/counted').body == b'1', 'an answer')
        process.terminate()
        assert process.wait(PATIENCE) == 0

    def test_a_slow_reader_of_the_log_gets_every_line(self, unread, tmp):
        process, log = unread('pipe', '--socket', 's')
        read = []

        def slowly():
            with contextlib.suppress(OSError):
                while data := os.read(log, 2000):
                    read.append(data)
                    time.sleep(0.002)
        reader = threading.Thread(target=slowly)
        reader.start()
        for i in range(300):
            ask(str(tmp / 's'), f'/hello?{i:03}{"x" * 500}')
        process.terminate()
        process.wait(PATIENCE)
        reader.join(PATIENCE)
        found = re.findall(rb'/hello\?(\d+)x+ =>', b''.join(read))         # 'stopping' may name the last one too
        assert found == [b'%03d' % i for i in range(300)]

    def test_durations_are_measured_by_the_clock_that_does_not_jump(self):
        """time.time() makes only texts that people and browsers read, and a file's name; and tells when one is old."""
        functions = re.findall(r'^ *def (\w+)(.*?)(?=^ *(?:def|class) |\Z)', SOURCE, re.M | re.S)
        uses = {name for name, body in functions if 'time.time()' in body}
        assert uses == {'magic', 'rotate_log', 'send_static', 'formatted', 'add', 'failed', 'http_headers',
                        'workers'}


def fuzz_for_long(number, first=1):
    with running(FUZZED, FUZZED_INI) as server:
        began = time.monotonic()
        kinds, failures = fuzz_packets(server, range(first, first + number))
        print(f'{number} cases from seed {first} in {time.monotonic() - began:.0f} s, {len(server.lines)} lines of log')
    for kind, many in kinds.most_common():
        print(f'{many:8} {kind}')
    print(f'{len(failures)} failures', *failures[:20], sep='\n')
    return bool(failures)


# ---------------------------------------------------------------------------------------------
# The front door: README.md, example.ini, and the shape of the whole

README, EXAMPLE, SOURCE = HERE / 'README.md', HERE / 'example.ini', MINUWSGI.read_text()


def parts():
    """[(first line, last line, title)] of the parts of minuwsgi.py."""
    lines = SOURCE.split('\n')
    begins = [(i, title[2:]) for i, title in enumerate(lines, 1) if i > 1 and lines[i - 2].startswith('# ----')
              and re.match(r'# \d+\. ', title)]
    ends = [begin - 2 for begin, _ in begins[1:]] + [len(lines)]
    return [(begin, end, title) for (begin, title), end in zip(begins, ends)]


def parts_table(old):
    """The table of parts with its line numbers; the third column stays as it is."""
    learn = dict(re.findall(r'^\|[^|]*\| (\d+\.) [^|]+ \| (.*) \|$', old, re.M))
    return ['| lines | part | read it to learn |', '|---|---|---|',
            *(f"| {begin}-{end} | {title} | {learn.get(title.split()[0], '?')} |" for begin, end, title in parts())]


def readme_as_it_should_be():
    """README.md with its tables made anew between their pairs of comments."""
    text = README.read_text()
    for name, make in ('options', lambda old: [options_as_markdown()]), ('parts', parts_table):
        begin, end = f'<!-- {name}: python3 test_minuwsgi.py --readme -->\n', f'<!-- end of {name} -->'
        before, _, rest = text.partition(begin)
        old, _, after = rest.partition(end)
        text = before + begin + '\n'.join(make(old)) + '\n' + end + after
    return text


class TestMessages:
    """A mistake is told with where it stands, what is wrong and what to do; the exit code is as documented."""

    @pytest.mark.parametrize('ini, words, code', [
        ('module = app\nsocket = 127.0.0.1:99999', "x.ini:3: can't bind 127.0.0.1:99999: '99999' is no port", 1),
        ('module = app\nsocket = http://127.0.0.1:8000', 'x.ini:3: can\'t bind http://127.0.0.1:8000: write', 1),
        ('module = app\nsocket = fd://x', "can't bind fd://x: write host:port, a path, or fd://3", 1),
        ('module = app\nsocket = s\nuid = nobdy', "there is no user 'nobdy'", 1),
        ('module = app\nsocket = s\nchown-socket = :nosuch', "there is no group 'nosuch'", 1),
        ('module = app\nsocket = s\nchdir = /nix', 'x.ini:4: chdir = /nix: No such file', 1),
        ('module = app\nsocket = s\nprocesses = 100000', '10000 in all are the most', 1),
        ('module = app\nsocket = s\nharakiri = 99999999999999', 'x.ini:4: ', 1),
        ('module = app\nsocket = s\nlimit-as = 99999999999999999999', 'x.ini:4: ', 1),
        ('module = app\nsocket = s\nvirtualenv = fake', 'virtualenv = ', 1),
        ('module = app\nsocket = s\nvirtualenv = broken', "can't run its bin/python", 1),
        ('module = app:number\nsocket = s', "x.ini:2: app: 'number' is 42, and no WSGI application", 22),
        ('module = app.py\nsocket = s', "'app.py' is no module; for a file: wsgi-file = FILE", 22),
        ('mount = /a=\nsocket = s', 'is no module', 22),
        ('module = app\nsocket = s\nimport = nix', "x.ini:4: there is no module 'nix'", 22),
        ('module = app\nsocket = s\nmount = /a=app:nix', "x.ini:4: app has no 'nix'; it has 'application': write", 22),
        ('module = app\nsocket = s\nchdir2 = /nix', 'x.ini:4: chdir2 = /nix: No such file', 22),
        ('module = app\nsocket = s\npythonpath = /nix\nchdir = /nix', 'x.ini:5: chdir = /nix: No such file', 1),
        ('module = app\nsocket = s\nuid = nobdy', "x.ini:4: there is no user 'nobdy'", 1),
        ('module = app\nsocket = s\npidfile = nix/p', 'x.ini:4: ', 1),
        ('module = app\nsocket = s\nlogto = fake', 'x.ini:4: ', 1),
        ('module = app\nsocket = s\nreq-logger = file:nix/r', 'x.ini:4: ', 1),
        ('module = app\nsocket = app.py', "can't bind app.py: there is a file of that name that isn't a socket", 1),
        ('module = app\nsocket = 127.0.0.1:1, 127.0.0.1:2', 'one address for each line', 1),
        ('module = app\nhttp-socket = =0', 'a number of a shared-socket; write its address here', 1),
        ('module = app\nsocket = s\nhttp-socket = s', 'x.ini:3: s is named twice', 1)])
    @pytest.mark.parametrize('check', [False, True])
    def test_a_mistake_is_told(self, tmp, ini, words, code, check):
        (tmp / 'app.py').write_text(HELLO + 'number = 42\n')
        for name in 'fake', 'broken':
            (tmp / name / 'bin').mkdir(parents=True)
        (tmp / 'fake' / 'bin' / 'python').symlink_to(sys.executable)
        (tmp / 'broken' / 'bin' / 'python').write_text('nothing')
        (tmp / 'broken' / 'bin' / 'python').chmod(0o755)
        (tmp / 'x.ini').write_text(f'[uwsgi]\n{ini}\n')
        found, output = run(tmp, 'x.ini', *['--check'] * check)
        assert words in output and 'Traceback' not in output and found == code, output

    def test_without_arguments_the_help_ends_with_what_is_missing(self, tmp):
        code, output = run(tmp)
        assert code == 1 and output.splitlines()[-1].startswith('minuwsgi: an application is expected, or an INI file')

    def test_a_host_that_can_not_be_one_is_told(self, tmp):
        code, output = run(tmp, 'minuwsgi:demo', '--http-socket', 'a..b:80')
        assert code == 1 and "can't bind a..b:80" in output and 'Traceback' not in output

    def test_the_environment_alone_may_configure_it(self, tmp):
        (tmp / 'app.py').write_text(HELLO)
        server = Server(tmp, [], environment={'UWSGI_SOCKET': 's', 'UWSGI_MODULE': 'app'})
        assert server.ready().ask().body == b'hello\n'
        server.end()

    def test_a_socket_that_cannot_be_given_away_is_not_left(self, tmp):
        (tmp / 'app.py').write_text(HELLO)
        code, output = run(tmp, 'app.py', '--socket', 's', '--chown-socket', ':nosuch')
        assert code == 1 and "command line: there is no group 'nosuch'" in output and not (tmp / 's').exists()

    @needs_root
    def test_a_socket_that_is_not_ours_to_remove_any_more_is_told(self, start, tmp):
        shutil.copy(MINUWSGI, tmp)
        server = start(HELLO, 'uid = nobody\nvacuum = true\npidfile = p', python='/usr/bin/python3')
        assert server.stop() == 0
        assert [line for line in server.lines if line.startswith('vacuum: ')] == [
            f"vacuum: {name} can't be removed: Permission denied" for name in (server.socket, tmp / 'p')]

    @needs_root
    def test_who_is_not_root_gives_nothing_away_and_becomes_nobody_else(self, start, tmp):
        import pwd
        os.chmod(tmp, 0o777)
        shutil.copy(MINUWSGI, tmp)
        nobody = {'python': '/usr/bin/python3', 'user': 'nobody', 'ready': False}
        server = start(HELLO, 'chown-socket = root', **nobody)
        assert server.wait() == 1 and not os.path.exists(server.socket)
        assert f"app.ini:4: {server.socket} can't be given to root: only root may" in server.log
        server = start(HELLO, 'uid = daemon\ngid = daemon', **nobody).ready()
        assert 'only root can become another user' in server.log and server.ask().body == b'hello\n'
        assert os.stat(server.socket).st_uid == pwd.getpwnam('nobody').pw_uid

    @pytest.mark.parametrize('prefix', ['unix:', 'unix://'])
    def test_check_takes_the_addresses_that_a_start_takes(self, start, tmp, prefix):
        server = start(ini=f'socket = {prefix}{tmp}/s')
        assert server.ask().text == 'hello\n' and run(tmp, 'app.ini', '--check')[0] == 0

    def test_a_value_may_be_of_another_encoding(self, tmp):
        (tmp / 'app.py').write_text(HELLO)
        (tmp / 'x.ini').write_bytes(b'[uwsgi]\nmodule = app\nsocket = s\nset = name=caf\xe9\n')
        assert run(tmp, 'x.ini', '--check')[0] == 0

    def test_curl_says_when_there_is_no_answer(self, tmp):
        assert run(tmp, '--curl', 'nowhere') == (1, 'minuwsgi: --curl nowhere: No such file or directory\n')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp / 'c'))
            listener.listen()

            def answer_nothing():
                with listener.accept()[0] as connection:
                    connection.recv(65536)
            threading.Thread(target=answer_nothing).start()
            assert run(tmp, '--curl', 'c') == (1, 'minuwsgi: --curl c: the connection was closed without an answer\n')

    def test_a_command_without_its_file_asks_for_it(self, tmp):
        assert run(tmp, '--stop') == (1, 'minuwsgi: --stop PIDFILE: No such file or directory\n')
        assert "what is 'hello'?" in run(tmp, 'hello')[1]


class TestReadme:
    """Whatever README.md shows has been tried, as it stands but for paths and ports."""

    BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', README.read_text(), re.M | re.S)

    @pytest.fixture
    def place(self, tmp, nginx):
        """A directory as README's reader has it; place(text) puts free paths and ports in place of its own."""
        port, tcp = free_port(), free_port()

        def place(text):
            for here, there in (('/tmp/minuwsgi.sock', f'{tmp}/s'), ('127.0.0.1:8000', f'127.0.0.1:{port}'),
                                ('/srv/shop/venv', sys.prefix), ('/srv/shop/minuwsgi.py', str(MINUWSGI)),
                                ('/srv/shop', str(tmp)), ('10.0.0.1:3031', f'127.0.0.1:{tcp}'),
                                ('10.0.0.2:3031', f'127.0.0.1:{free_port()}'), ('python3 ', f'{sys.executable} ')):
                text = text.replace(here, there)
            return text
        place.http, place.tcp = ('127.0.0.1', port), ('127.0.0.1', tcp)
        for file in MINUWSGI, EXAMPLE, README, HERE / 'test_minuwsgi.py':
            (tmp / file.name).write_text(place(file.read_text()) if file is EXAMPLE else file.read_text())
        for language, text in self.BLOCKS:
            if language == 'python':
                (tmp / text.split()[1]).write_text(text)
        (tmp / 'shop').mkdir()
        (tmp / 'shop' / 'wsgi.py').write_text(HELLO)
        (tmp / 'shop.ini').write_text('[uwsgi]\nmodule = shop.wsgi:application\nsocket = s\n')
        place.servers, place.tmp, place.nginx = [], tmp, nginx
        yield place
        for server in place.servers:
            server.end()

    def serve(self, place, *arguments):
        place.servers.append(Server(place.tmp, arguments).ready())
        return place.servers[-1]

    @pytest.mark.parametrize('language, text', BLOCKS, ids=[f'{i}-{block[0]}' for i, block in enumerate(BLOCKS)])
    def test_every_block_works(self, place, language, text):
        getattr(self, f'try_{language}')(place, text)

    def try_sh(self, place, text):
        """A command that serves is asked; others run to their end, beside the server of example.ini."""
        assert text.count('\n') == 1, 'one command, one line'
        command = place(text)
        if '-m pytest' in text:                         # all of it runs in .ci/run
            pytest.importorskip('xdist')
            run_it, _, tests = command.rpartition('&& ')[2].partition(' -q ')
            command = f'{run_it} -q -p no:cacheprovider {tests.strip()} -k tools_work'.replace('-n 3', '-n 0')
        elif '--bench' in text:
            return                                      # with what it prints, below
        elif 'minuwsgi.py' in text and '--curl' not in text and '--readme' not in text:
            if 'hello:app' in text:
                pytest.importorskip('flask')
            self.serve(place, *command.split()[2:])
            command = place('curl -s http://127.0.0.1:8000/')
        else:
            self.serve(place, 'example.ini')
        if command.startswith('curl') and not shutil.which('curl'):
            pytest.skip('curl is not installed')
        done = subprocess.run(command, shell=True, cwd=place.tmp, timeout=PATIENCE, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        assert re.search('Hello|this is worker|1 passed|README.md is up to date', done.stdout), done.stdout

    def try_text(self, place, text):
        """Each line was printed by example.ini's server, or came as its answer; numbers may differ."""
        if text.startswith('CPU time'):
            return self.try_bench(text)
        def bare(text):
            return [re.sub(r'[\d.]+', '0', line) for line in text.splitlines()]
        server = self.serve(place, 'example.ini')
        real = server.log.replace(f'{place.tmp}/s', '/tmp/minuwsgi.sock') + '\n' + server.ask().raw.decode()
        with connect(place.http) as connection:
            connection.sendall(b'GET / HTTP/1.0\r\nHost: x\r\n\r\n')
            real += '\n' + Answer(read_all(connection)).text
        assert set(bare(text)) <= set(bare(real)), real

    def try_bench(self, text):
        command = next(text for _, text in self.BLOCKS if '--bench' in text)
        done = subprocess.run(f'{command.strip()} 0.3', shell=True, cwd=HERE, timeout=3 * PATIENCE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        shown, printed = ([line.partition(' times the least  ') for line in part.splitlines()]
                          for part in (text, done.stdout))
        assert done.returncode == 0 and printed[0] == shown[0], done.stdout
        costs = {name: float(ratio) for ratio, _, name in printed[1:]}
        assert [name for _, _, name in shown[1:] if name in costs] == list(costs)
        floor, ours = list(costs.values())[:2]
        assert 1 <= floor < 2 and floor < ours < 20 * floor

    def try_ini(self, place, text):
        (place.tmp / 'block.ini').write_text(place(text))
        server = self.serve(place, 'block.ini')
        assert not [line for line in server.lines if 'block.ini' in line]       # no warning
        assert ask(place.tcp if '3031' in text else server.socket).text == 'hello\n'

    def try_python(self, place, text):
        if 'flask' in text:
            pytest.importorskip('flask')
        file = text.split()[1]
        server = self.serve(place, file, *(['--callable', 'app'] if 'app =' in text else []), '-s', 's')
        assert server.ask().text in ('Hello\n', '6\r\nHello\n\r\n0\r\n\r\n')

    def try_nginx(self, place, text):
        self.serve(place, 'example.ini', '--socket', '%s:%s' % place.tcp)
        port = free_port()
        text = place(text) if 'server {' in text else f'server {{ listen 80; {place(text)} }}'
        front = place.nginx({}, text.replace('listen 80;', f'listen 127.0.0.1:{port};'))
        front.ports['readme'] = port
        wait_until(lambda: front.listens(port), 'nginx')
        assert all(b'this is worker' in front.ask('readme').content for _ in range(5))
        assert 'proxy_pass' not in text or b'HTTP_X_FORWARDED_PROTO = http\n' in front.ask('readme').content

    def try_systemd(self, place, text):
        """A service's commands start and reload a server, with the socket if it is the unit of one; the names of
        sections and keys are systemd's."""
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read_string(place(text))
        if 'Socket' in unit:
            return self.try_activation(place, unit['Socket'])
        service = unit['Service']
        assert set(service) == {'WorkingDirectory', 'ExecStart', 'ExecReload', 'User', 'KillMode', 'Restart'}
        assert service['WorkingDirectory'] == str(place.tmp)
        place.servers.append(Server(place.tmp, service['ExecStart'].split()[3:], program=('-m', 'minuwsgi')).ready())
        server = place.servers[0]
        if not os.path.exists('/bin/kill'):
            pytest.skip('there is no /bin/kill (of procps)')
        subprocess.run(service['ExecReload'].replace('$MAINPID', str(server.pid)).split(), check=True)
        server.wait_for('^ready', 2)
        assert server.ask().text == 'hello\n'

    def try_activation(self, place, unit):
        assert set(unit) == {'ListenStream', 'SocketMode', 'SocketGroup'}
        path = str(place.tmp / os.path.basename(unit['ListenStream']))
        (place.tmp / 'shop.ini').write_text('[uwsgi]\nmodule = shop.wsgi:application\n')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            place.servers.append(Server(place.tmp, ['shop.ini'], program=('-c', AS_SYSTEMD, str(listener.fileno()),
                                        str(MINUWSGI)), pass_fds=[listener.fileno()]).ready())
        assert ask(path).text == 'hello\n'

    def test_its_tables_are_those_of_the_source(self):
        assert README.read_text() == readme_as_it_should_be(), 'run: python3 test_minuwsgi.py --readme'

    def test_it_has_a_word_on_each_part(self):
        assert '| ? |' not in README.read_text()

    def test_its_links_and_files_are_there(self):
        text = README.read_text()
        for target in re.findall(r'\]\(([^)]+)\)', text):
            assert target.startswith('https://') or (HERE / target).exists(), target

    def row(self, wanted):
        """The text of the log that README's table of troubles shows; fails if it isn't there."""
        found = re.findall(r'^\|[^|]*\| (?:nginx: )?`([^`]+)`', README.read_text(), re.M)
        found = [text for text in found if wanted in text]
        assert len(found) == 1, (wanted, found)
        return found[0]

    def test_trouble_no_socket(self, nginx, tmp):
        front = nginx({'site': UWSGI.format(tmp)})
        assert front.ask('site').status == 502 and self.row('No such file') in front.log()

    def test_trouble_permission(self, nginx, tmp, start):
        if os.getuid():
            pytest.skip('only root can run nginx as another user')
        start()
        front = nginx({'site': UWSGI.format(tmp)}, user='nobody nogroup')
        assert front.ask('site').status == 502 and self.row('(13: Permission denied)') in front.log()

    def test_trouble_large_cookies(self, nginx, tmp, start):
        start('def application(e, s):\n    s("200 OK", [("Set-Cookie", 20000 * "x")])\n    return []')
        cure = re.search(r'`(uwsgi_buffer_size [^`]*)`', README.read_text())[1]
        front = nginx({'site': UWSGI.format(tmp), 'cured': cure + UWSGI.format(tmp)})
        assert front.ask('site').status == 502 and self.row('too big header') in front.log()
        assert front.ask('cured').status == 200

    def test_trouble_queue_full(self, nginx, tmp, start):
        os.mkfifo(tmp / 'fifo')
        server = start("""
            def application(environ, start_response):
                print('at work', file=environ['wsgi.errors'])
                open('fifo').read()
                start_response('200 OK', [])
                return []
        """, 'listen = 1')
        front = nginx({'site': UWSGI.format(tmp)})
        with contextlib.ExitStack() as waiting:
            with contextlib.suppress(BlockingIOError):
                for _ in range(10):
                    connection = waiting.enter_context(socket.socket(socket.AF_UNIX))
                    connection.setblocking(False)
                    connection.connect(server.socket)
                    connection.send(packet())
                    server.wait_for('at work')          # so it isn't in the queue
                raise AssertionError('the queue has no end')
            assert front.ask('site').status == 502 and self.row('temporarily') in front.log()
        end = os.open(tmp / 'fifo', os.O_RDWR)          # the request at hand goes on
        os.unlink(tmp / 'fifo')
        (tmp / 'fifo').touch()                          # as do all others
        os.close(end)

    def test_trouble_a_worker_dies(self, nginx, tmp, start):
        server = start("""
            def application(environ, start_response):
                environ['wsgi.input'].read()
                __import__('os').abort()
        """)
        front = nginx({'site': UWSGI.format(tmp)})
        assert front.ask('site', '/', b'x' * 100_000).status == 502 and self.row('prematurely') in front.log()
        assert 'SIGABRT' in server.wait_for('died: .*, at POST /')

    def test_trouble_http_to_a_uwsgi_socket(self, start):
        server, wanted = start(), self.row('speaks the uwsgi')
        assert wanted in Answer(exchange(server.socket, b'GET / HTTP/1.1\r\nHost: x\r\n\r\n')).text
        assert wanted in server.wait_for('bad request')

    def test_trouble_harakiri(self, start):
        shown = self.row('harakiri')
        server = start('import time\ndef application(environ, start_response):\n    time.sleep(60)', 'harakiri = 0.3')
        server.tracebacks_expected = True
        assert server.ask('/report').status == '504 Gateway Timeout'
        assert re.sub(r'\d+', '1', shown) in re.sub(r'\d+', '1', server.log)

    def test_trouble_no_module(self, tmp):
        code, output = run(tmp, 'shop:app', '-s', 's')
        assert code == 22 and self.row('no module') in output

    def test_trouble_address_in_use(self, tmp, start):
        server = start(http=True)
        name = '%s:%s' % server.http
        code, output = run(tmp, 'app:application', '--http-socket', name)
        assert code == 1 and self.row('in use').replace('127.0.0.1:8000', name) in output
        code, output = run(tmp, 'app:application', '-s', 's')
        assert code == 1 and self.row('another server').replace('4711', str(server.pid)) in output


class TestExample:
    """example.ini is the first file that a newcomer reads."""

    def test_each_option_has_a_line_of_comment(self):
        lines = EXAMPLE.read_text().splitlines()
        settings = [i for i, line in enumerate(lines) if '=' in line and line[0] != ';']
        assert len(settings) >= 8 and all(lines[i - 1].startswith('; ') for i in settings)

    def test_it_has_the_customers_seven_options(self):
        names = [line.partition('=')[0].strip() for line in EXAMPLE.read_text().splitlines()]
        assert {'module', 'master', 'processes', 'socket', 'chmod-socket', 'vacuum', 'die-on-term'} <= set(names)

    def test_it_starts_with_three_lines_and_no_warning(self, tmp):
        text = EXAMPLE.read_text().replace('/tmp/minuwsgi.sock', f'{tmp}/s').replace(':8000', f':{free_port()}')
        (tmp / 'example.ini').write_text(text)
        server = Server(tmp, ['example.ini']).ready()
        try:
            assert len([line for line in server.lines if 'runs as root' not in line]) == 3
            source = Answer(exchange(server.socket, packet('/file'))).body
            assert source == MINUWSGI.read_bytes()
        finally:
            server.end()


class TestShape:
    """The file can be read from top to bottom, and needs nothing but Python."""

    TREE = ast.parse(SOURCE)

    def test_there_are_five_files(self):
        assert {file.name for file in HERE.iterdir() if file.name[0] not in '._'} == {
            'minuwsgi.py', 'test_minuwsgi.py', 'example.ini', 'README.md', 'LICENSE'}

    def test_it_imports_the_standard_library_alone(self):
        library = sysconfig.get_paths()['stdlib']
        for node in ast.walk(self.TREE):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                origin = importlib.util.find_spec(name.partition('.')[0]).origin
                inside = origin.startswith(library) and '-packages' not in origin
                assert inside or origin in ('built-in', 'frozen'), name

    def test_nothing_is_used_above_its_definition(self):
        assert forward_references(SOURCE) == []

    def test_no_function_changes_a_global_name(self):
        assert not [node.lineno for node in ast.walk(self.TREE) if isinstance(node, ast.Global)]

    def test_classes_inherit_from_exceptions_io_and_threading_alone(self):
        for node in ast.walk(self.TREE):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    found = eval(ast.unparse(base), vars(minuwsgi))
                    own = found.__module__ == 'minuwsgi'
                    assert issubclass(found, (BaseException, io.IOBase, threading.Thread)) or own, node.name

    @pytest.mark.parametrize('file', ['minuwsgi.py', 'test_minuwsgi.py'])
    def test_no_line_is_longer_than_120_columns(self, file):
        assert [i for i, line in enumerate((HERE / file).read_text().splitlines(), 1) if len(line) > 120] == []


def forward_references(source):
    """['function: name'] where a function or a class at the top uses a top-level name from further down."""
    defined = {}                                        # name -> line where it is first bound
    for node in ast.parse(source).body:
        targets = [node] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            name for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
        for target in targets:
            defined.setdefault(getattr(target, 'name', None) or target.id, target.lineno)

    def used(table):
        """The names of the module that a function or class and those within it use."""
        names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
        return names.union(*map(used, table.get_children()))
    found = []
    for table in symtable.symtable(source, 'minuwsgi.py', 'exec').get_children():
        here, line = table.get_name(), table.get_lineno()
        found += [f'{here}: {name}' for name in sorted(used(table)) if name != here and defined.get(name, 0) > line]
    return found


# ---------------------------------------------------------------------------------------------
# Speed: python3 test_minuwsgi.py --bench [SECONDS]

FLOOR = '''
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind('s')
listener.listen(1024)
print('ready', flush=True)
while True:
    fd, _ = listener._accept()
    os.read(fd, 65536)
    os.write(fd, b'HTTP/1.1 200 OK\\r\\nContent-Type: text/plain\\r\\nContent-Length: 6\\r\\n\\r\\nhello\\n')
    os.close(fd)
'''
UWSGI_PACKET, HTTP_HEAD = packet(), b'GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n'


def contestants():
    """(name, command, bytes of a request) of the servers that are there; each is to listen on the unix socket s."""
    yield 'a bare loop of accept, read, write, close', [sys.executable, '-c', FLOOR], HTTP_HEAD
    quiet = ['--module', 'app', '--disable-logging', '--processes', '1']
    yield 'minuwsgi, uwsgi protocol', [sys.executable, MINUWSGI, *quiet, '--socket', 's'], UWSGI_PACKET
    yield 'minuwsgi, HTTP', [sys.executable, MINUWSGI, *quiet, '--http-socket', 's'], HTTP_HEAD
    if UWSGI_BINARY:
        yield 'uWSGI, uwsgi protocol', [UWSGI_BINARY, '--master', *quiet, '--socket', 's'], UWSGI_PACKET
    gunicorn = shutil.which('gunicorn') or os.path.join(os.path.dirname(UWSGI_BINARY), 'gunicorn')
    if os.access(gunicorn, os.X_OK):
        yield 'gunicorn, HTTP', [gunicorn, 'app:application', '--bind', 'unix:s', '--workers', '1'], HTTP_HEAD


def cpu_time(pid):
    """Nanoseconds that a process and its descendants have computed, see proc(5) on schedstat."""
    threads = pathlib.Path('/proc', str(pid), 'task').iterdir()
    return sum(int((thread / 'schedstat').read_text().split()[0]) for thread in threads) + \
        sum(map(cpu_time, children(pid)))


def burst(address, request):
    """Eight requests at once, so that the server always has the next one to do."""
    connections = [socket.socket(socket.AF_UNIX) for _ in range(8)]
    for connection in connections:
        connection.connect(address)
        connection.sendall(request)
    for connection in connections:
        with connection:                                # gunicorn waits until its client closes
            answer = read_all(connection)
        assert answer.startswith(b'HTTP/1.1 200 OK\r\n') and answer.endswith(b'\r\n\r\nhello\n'), answer


def bench(seconds):
    """{name: microseconds of CPU for a request}. The servers take turns; what counts is a turn that only a fifth of
    the others were better than: the rest is disturbed by what else the machine does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)        # `&` in a script has it ignored
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, command, request in contestants():
            place = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='mu')))
            (place / 'app.py').write_text(HELLO)
            process = subprocess.Popen(list(map(str, command)), cwd=place, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGINT)
            wait_until((place / 's').exists, f'{name}: its socket')
            servers[name] = process.pid, str(place / 's'), request, []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for pid, address, request, found in servers.values():
                burst(address, request)                 # the caches are warm then
                before = cpu_time(pid)
                for _ in range(10):
                    burst(address, request)
                found.append((cpu_time(pid) - before) / 80000)
        return {name: sorted(found)[len(found) // 5] for name, (_, _, _, found) in servers.items()}


def print_bench(seconds):
    found = bench(seconds)
    least = min(found.values())
    print('CPU time of a request, hello world on a unix socket, a connection each:')
    for name, cost in found.items():
        print(f'{cost / least:6.2f} times the least  {name}')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--bench']:
        print_bench(float((sys.argv[2:] or ['20'])[0]))
    elif sys.argv[1:] == ['--readme']:
        README.write_text(readme_as_it_should_be())
        print('README.md is up to date')
    elif sys.argv[1:2] == ['--soak']:
        sys.exit(not soak(float(sys.argv[2])))
    elif sys.argv[1:2] == ['--fuzz']:
        sys.exit(fuzz_for_long(*map(int, sys.argv[2:4])))
    else:
        sys.exit(pytest.main([__file__, *sys.argv[1:]]))
