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
    assert server.get('/abc').text == '/abc'
    assert server.stop() == 0
