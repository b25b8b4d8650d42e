"""Tests of minuwsgi: what it promises, in the order of the module.

    python3 -m pytest test_minuwsgi.py                  all
    python3 -m pytest test_minuwsgi.py -k vacuum        those with a word in their name

A test starts the real server in a directory of its own and talks to it over real sockets. It waits
for events (a line in the log, the end of a process), never for time to pass. At its end the log
must hold no traceback that the test didn't ask for, and no process may be left.
"""
import contextlib
import json
import os
import pathlib
import random
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
def test_hop_by_hop_headers_of_the_application_are_refused(echo, name):
    answer, = answers(send_raw(echo, f'GET /x/hop?{name} HTTP/1.1\r\nHost: x\r\n\r\n'.encode()))
    assert answer.status == '500 Internal Server Error'
    echo.wait_for(f'{name} belongs to the connection: an application must not send it')


def test_a_short_response_is_cut(echo):
    assert send_raw(echo, b'GET /x/short HTTP/1.1\r\nHost: x\r\n\r\n' * 2).count(b'HTTP/1.1') <= 1


def test_date_is_now(echo):
    from email.utils import parsedate_to_datetime
    said = parsedate_to_datetime(echo.get('/').header('Date')).timestamp()
    assert abs(said - time.time()) < 2 and echo.get('/').header('Server') == 'minuwsgi'


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


def test_a_client_may_pipeline_more_than_it_reads(echo):
    with Kept(echo) as client:
        requests = b''.join(b'GET /%d HTTP/1.1\r\nHost: x\r\n\r\n' % i for i in range(20000))
        sender = threading.Thread(target=client.connection.sendall, args=(requests,))
        sender.start()
        assert echo.get('/meanwhile').status == '200 OK'
        for i in range(20000):
            assert json.loads(client.answer().body)['PATH_INFO'] == f'/{i}'
        sender.join(PATIENCE)


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
            (b'GET / HTTP/1.1\r\n' + b'X: 1\r\n' * 12000, 'the head is too long')]


@pytest.mark.parametrize('data, words', NOT_HTTP)
def test_what_is_not_http_is_answered_in_words(echo, data, words):
    with connect(echo.http) as connection:
        connection.sendall(data)
        answer, = answers(read_all(connection))
    assert answer.status[:3] in ('400', '414', '431') and words in answer.text


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
    ('X-Forwarded-For: 10.1.1.1', '10.1.1.1', 'http'),
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


@pytest.fixture(scope='module')
def behind_proxy():
    with running(ECHO, 'trust-proxy = 127.0.0.1\ntrust-proxy = 10.0.0.0/8') as server:
        yield server


def test_fuzzing_gets_well_formed_answers_only(echo):
    """MINUWSGI_FUZZ=20000 for more. A failure names the seed of its input."""
    seeds = [b'GET /a?b=c HTTP/1.1\r\nHost: x\r\nX-Y: z\r\nCookie: a=b\r\n\r\n',
             b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\nContent-Type: text/plain\r\n\r\nhello world',
             b'POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n'
             b'5;a=b\r\nhello\r\n6\r\n world\r\n0\r\nT: 1\r\n\r\n',
             b'HEAD http://x/ HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n']
    pieces = [b'\r\n', b'\n', b'\r', b'\0', b' ', b'\t', b':', b';', b',', b'0', b'ffffffff', b'-1', b'\xff',
              b'HTTP/1.1', b'%00',
              b'chunked', b'Content-Length: 3\r\n', b'Transfer-Encoding: chunked\r\n', b'Host: y\r\n',
              b'Expect: 100-continue\r\n',
              b'\r\n\r\n', b'/../', b'a' * 5000]
    for number in range(int(os.environ.get('MINUWSGI_FUZZ', 1000))):
        chance = random.Random(number)
        data = bytearray(b''.join(chance.choices(seeds, k=chance.randint(1, 3))))
        for _ in range(chance.randint(1, 6)):
            at, size = chance.randrange(len(data) + 1), chance.choice((0, 0, 1, 2, 8, 40))
            new = chance.choice((chance.choice(pieces), bytes([chance.randrange(256)]), data[at:at + 30] * 2))
            data[at:at + size] = new
        raw = send_raw(echo, bytes(data))
        try:
            is_head = data.find(b'HEAD') >= 0
            assert is_head and (not raw or raw.startswith(b'HTTP/1.1 ')) or not is_head and answers(raw) is not None
        except AssertionError as error:
            raise AssertionError(f'seed {number}: {bytes(data)!r} got {raw[:500]!r}') from error
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
          ('/s/sub/../a.txt', b'0123456789', 'text/plain'), ('/s/%61.txt', b'0123456789', 'text/plain'),
          ('/z.txt', b'checked', None),
          ('/m2/y.txt', b'map2', None), ('/icon.ico', b'icon', None), ('/linked/a.txt', b'0123456789', None),
          ('/s/a.txt?v=1', b'0123456789', 'text/plain')]
MISSED = ['/', '/s', '/s/', '/s/none', '/sa.txt', '/s/a.txt/', '/s/a.txt/x', '/s/../secret', '/s/%2e%2e/secret',
          '/s/..%2fsecret',
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
    ('Range: bytes=0-3', 206, b'0123', 'bytes 0-3/10'), ('Range: bytes=8-', 206, b'89', 'bytes 8-9/10'),
    ('Range: bytes=-3', 206, b'789', 'bytes 7-9/10'), ('Range: bytes=5-99', 206, b'56789', 'bytes 5-9/10'),
    ('Range: bytes=-99', 206, b'0123456789', 'bytes 0-9/10'), ('Range: BYTES = 1 - 2', 206, b'12', 'bytes 1-2/10'),
    ('Range: bytes=10-', 416, b'', 'bytes */10'), ('Range: bytes=-0', 416, b'', 'bytes */10'),
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


def test_static_expires_that_cannot_be_read_stops_the_start(tmp):
    (tmp / 'app.py').write_text(FALLS_THROUGH)
    code, output = run(tmp, '--http-socket', f'127.0.0.1:{free_port()}', '--check-static', '.',
                       '--static-expires', '*.css soon', 'app.py')
    assert code == minuwsgi.EXIT_NO_APP and 'static-expires = *.css soon' in output


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
