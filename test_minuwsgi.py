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

PATIENCE = float(os.environ.get('MINUWSGI_PATIENCE', 20))     # seconds after which an event that doesn't come is a failure

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


@pytest.fixture(scope='module')
def shared():
    """shared(app) is a server that all tests of the module with the same application use."""
    servers = {}

    def shared(app, ini='', http=True):
        if (app, ini) not in servers:
            directory = pathlib.Path(tempfile.mkdtemp(prefix='mu'))
            (directory / 'app.py').write_text(app)
            port = free_port()
            (directory / 'app.ini').write_text(f'[uwsgi]\nsocket = s\nhttp-socket = 127.0.0.1:{port}\nmodule = app\n{ini}\n')
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
    done = subprocess.run([sys.executable, str(MINUWSGI), *map(str, arguments)], cwd=tmp, text=True, timeout=PATIENCE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options)
    return done.returncode, done.stdout


def test_the_tools_work(start):
    server = start('def application(e, s):\n  s("200 OK", [])\n  return [e["PATH_INFO"].encode()]', http=True)
    assert server.ask('/abc').text == '/abc'
    assert server.get('/abc').text[3:7] == '/abc'
    assert server.stop() == 0


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

    @pytest.mark.parametrize('make', [
        lambda path: path.write_text('precious'), lambda path: path.mkdir(), lambda path: path.symlink_to('elsewhere')])
    def test_what_is_no_socket_is_never_removed(self, tmp, make):
        make(tmp / 's')
        code, output = run(tmp, '--socket', 's', '--module', 'minuwsgi:demo')
        assert code == 1 and "isn't a socket" in output and os.path.lexists(tmp / 's')

    def test_a_taken_port_is_an_error_in_words(self, start, tmp):
        server = start(http=True)
        code, output = run(tmp, '--http-socket', '%s:%d' % server.http, '--module', 'minuwsgi:demo')
        assert code == 1 and f"can't bind 127.0.0.1:{server.http[1]}: Address already in use" in output

    @pytest.mark.parametrize('address, words', [
        ('nowhere/s', 'there is no directory'), ('x' * 120, 'longer than the 107 bytes'), ('127.0.0.1:http', 'is no port'),
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


ENVIRON = '''
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
        names = [*minuwsgi.CONSTANT, 'REQUEST_METHOD', 'QUERY_STRING', 'CONTENT_LENGTH', 'REQUEST_URI', 'HTTP_A', 'HTTP_B',
                 'HTTP_COOKIE', 'HTTP_CONTENT_TYPE', 'PATH_INFO']
        values = ['', 'GET', '/', 'x' * 300, 'http', 'on', '\xff\0']
        row, expected = minuwsgi.Row(), minuwsgi.Expected({'base': 'x'})
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
    """What a packet means, by the plain reader; None for a bad one."""
    try:
        pairs = minuwsgi.unpack_vars(data[4:])
    except minuwsgi.BadRequest:
        return None
    environ = {'base': 'x'}
    for name, value in pairs:
        if len(name) > 255:
            return None
        if name in environ and name.startswith('HTTP_'):
            value = environ[name] + ('; ' if name == 'HTTP_COOKIE' else ', ') + value
        environ[name] = value
    for name in minuwsgi.UNWANTED:
        environ.pop(name, None)
    minuwsgi.set_scheme(environ)
    return environ


def read_by_plan(expected, memory, end):
    """As Core.serve() does it."""
    start, start_end, started, started_pieces, new, all_pieces, _ = expected.plan
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
        expected.rest(environ, memory, text, at, raw)
    return environ


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
        server = shared(ENVIRON)
        before = len(server.lines)
        answer = Answer(exchange(server.socket, data))
        assert answer.status.startswith('4') and words in answer.text
        wait_until(lambda: any('bad request' in line and words in line for line in server.lines[before:]), words)
        assert server.ask().status == '200 OK'

    def test_byte_by_byte(self, shared):
        data = packet('/some/path?query')
        with connect(shared(ENVIRON).socket) as connection:
            for i in range(len(data)):
                connection.sendall(data[i:i + 1])
            assert eval(Answer(read_all(connection)).body)['PATH_INFO'] == '/some/path'

    @pytest.mark.parametrize('size', [0, 1, 3, 4, 5, 100])
    def test_a_packet_that_ends_early_leaves_the_server_alone(self, shared, size):
        server = shared(ENVIRON)
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
        assert 'too slow' in server.log
        assert server.ask().body == b'hello\n'

    def test_a_client_that_dribbles_has_the_timeout_in_all(self, start):
        server = start(ini='socket-timeout = 1')
        with connect(server.socket) as slow, pytest.raises((BrokenPipeError, AssertionError)):
            slow.sendall(b'\0\xff\xff\0')
            wait_until(lambda: slow.send(b'x') == 0, 'the end')
        assert server.ask().body == b'hello\n'

    def test_a_ping_is_answered(self, shared):
        assert exchange(shared(ENVIRON).socket, b'\x64\0\0\0') == b'\x64\0\0\1'

    def test_the_largest_packet(self, shared):
        value = 'x' * (65535 - 1000)
        answer = shared(ENVIRON).ask(HTTP_COOKIE=value)
        assert eval(answer.body)['HTTP_COOKIE'] == value

    def test_modifier_30_takes_the_script_name_off(self, shared):
        data = bytearray(packet('/app/page', SCRIPT_NAME='/app'))
        data[0] = 30
        environ = eval(Answer(exchange(shared(ENVIRON).socket, bytes(data))).body)
        assert (environ['SCRIPT_NAME'], environ['PATH_INFO']) == ('/app', '/page')

    def test_curl_asks_any_uwsgi_server(self, shared, tmp):
        code, output = run(tmp, '--curl', shared(ENVIRON).socket, '/a%20b?c')
        assert code == 0 and output.startswith('HTTP/1.1 200 OK') and "'PATH_INFO': '/a b'" in output
        code, output = run(tmp, '--curl', tmp / 'nothing')
        assert code == 1 and "can't connect" in output


# ---------------------------------------------------------------------------------------------
# 6. WSGI

APPS = '''
import io, os, sys, threading
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
def late_start(e, s):
    s('200 OK', []); yield b'x'
def only_bytes(e, s):
    s('200 OK', []); return b'whole'
def write(e, s):
    w = s('200 OK', []); w(b'a'); w(b'b'); return [b'c']
def empty(e, s):
    s('200 OK', [('X-Empty', 'yes')]); return []
def environ(e, s):
    body = repr({k: repr(v) if type(v) is not str else v for k, v in e.items()}).encode(); s('200 OK', []); return [body]
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
    s('200 OK', [('Content-Length', '9')]); yield b'part'; raise RuntimeError('fails at a later item')
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
def too_much(e, s):
    s('200 OK', [('Content-Length', '4')]); return [b'partial', b'more']
def exits(e, s):
    sys.exit(3)
def bad_head(e, s):
    status, headers = eval(e['QUERY_STRING']); s(status, headers); return [b'x']
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
def bytesio(e, s):
    s('200 OK', []); return e['wsgi.file_wrapper'](io.BytesIO(b'x' * 100000))
def pipe(e, s):
    r, w = os.pipe(); os.write(w, b'from a pipe'); os.close(w)
    s('200 OK', []); return e['wsgi.file_wrapper'](os.fdopen(r, 'rb'))
def big(e, s):
    s('200 OK', [('Content-Length', '20000000')]); return [b'x' * 10000000, b'y' * 10000000]
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
        ('replaced', 'oops')])
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
        ({'HTTPS': 'off'}, 'http'), ({'UWSGI_SCHEME': 'https'}, 'https'), ({'HTTP_X_FORWARDED_PROTO': 'https'}, 'http')])
    def test_the_scheme_is_what_the_web_server_says(self, apps, variables, scheme):
        for _ in range(3):
            assert eval(apps.ask('environ', **variables).body)['wsgi.url_scheme'] == scheme

    @pytest.mark.parametrize('call, value', [
        ('i.read()', b'one\ntwo\nthree'), ('i.read(-1)', b'one\ntwo\nthree'), ('i.read(0)', b''), ('i.read(5)', b'one\nt'),
        ('(i.read(100),i.read(),i.read(5))', (b'one\ntwo\nthree', b'', b'')), ('i.readline()', b'one\n'),
        ('i.readline(2)', b'on'), ('(i.readline(),i.read())', (b'one\n', b'two\nthree')), ('list(i)', [b'one\n', b'two\n', b'three']),
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

    @pytest.mark.parametrize('call, value', [('i.read()', b''), ('i.read(5)', b''), ('i.readline()', b''), ('list(i)', []),
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

    @pytest.mark.parametrize('size', [100, 3000000])
    def test_an_unread_body_never_breaks_the_answer(self, apps, size):
        for _ in range(5):
            answer = apps.ask('unread', b'x' * size)
            assert (answer.status, answer.body) == ('401 Unauthorized', b'no')

    def test_wsgi_errors_is_the_log_at_once(self, apps):
        apps.ask('errors')
        apps.wait_for('written to wsgi.errors')

    @pytest.mark.parametrize('path, words', [
        ('fail_early', 'fails before the head'), ('fail_after_start', 'fails after the head'), ('fail_first', 'first item'),
        ('none', 'returned None'), ('a_str', 'made of bytes, not of str'), ('str_items', 'made of bytes, not of str'),
        ('an_int', "'int' object is not iterable"), ('no_start', "didn't call start_response"), ('twice', 'a second time'),
        ('exits', 'SystemExit: 3')])
    def test_an_application_that_fails_early_gives_a_500_and_a_traceback(self, apps, path, words):
        apps.tracebacks_expected = True
        before = len(apps.lines)
        assert apps.ask(path).status == '500 Internal Server Error'
        wait_until(lambda: any(words in line for line in apps.lines[before:]), words)
        assert apps.ask('hello').status == '200 OK'

    @pytest.mark.parametrize('path, words', [
        ('fail_later', 'fails at a later item'), ('exc_info_late', 'the original error'), ('too_little', '5 bytes less')])
    def test_a_response_that_breaks_off_is_never_made_whole(self, apps, path, words):
        apps.tracebacks_expected = True
        answer = apps.ask(path)
        assert answer.status == '200 OK' and answer.body in (b'part', b'') and answer.header('content-length') == '9'
        apps.wait_for(words)

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
        ('200 OK', [('X', 'a\r\nY: b')]), ('200 OK', [('X', 'a\nb')]), ('200 OK', [('X', 'a\0')]), ('200 OK', [('X\r\nY', 'b')]),
        ('200 OK', [('X: Y', 'b')]), ('200 OK', [('', 'b')]), ('200 OK', [('X', 5)]), ('200 OK', [(b'X', 'b')]),
        ('200 OK', [('X', b'b')]), ('200 OK', [('X', '\u20ac')]), ('200 OK', [('Connection', 'close')]),
        ('200 OK', [('Transfer-Encoding', 'chunked')]), ('200 OK', [('Content-Length', '-1')]),
        ('200 OK', [('Content-Length', 'many')]), ('200 OK', None), ('200 OK', [('X',)])])
    def test_a_bad_head_is_refused(self, apps, status, headers):
        apps.tracebacks_expected = True
        answer = apps.ask('bad_head', QUERY_STRING=ascii((status, headers)))
        assert answer.status == '500 Internal Server Error' and answer.header('Y') is None

    @pytest.mark.parametrize('method, status, body', [
        ('HEAD', '200+OK', b''), ('GET', '204+No+Content', b''), ('GET', '304+Not+Modified', b''), ('GET', '200+OK', b'body'),
        ('GET', '404', b'body')])
    def test_no_body_where_there_is_none(self, apps, method, status, body):
        answer = apps.ask('status', QUERY_STRING=status, REQUEST_METHOD=method)
        assert answer.body == body and answer.status.strip() == status.replace('+', ' ')

    def test_head_of_everything(self, apps, tmp):
        (tmp / 'f').write_bytes(b'x' * 1000)
        for path in 'hello', 'generator', 'write', 'chunks', 'file', 'empty':
            answer = apps.ask(path, REQUEST_METHOD='HEAD', HTTP_FILE=str(tmp / 'f'))
            assert (answer.status, answer.body) == ('200 OK', b'')

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
        for path, text in (('/a/x', 'one /a /x'), ('/a', 'one /a '), ('/a/b/c', 'two /a/b /c'), ('/a/bc', 'one /a /bc')):
            assert server.ask(path).text == text
        assert server.ask('/ax').status == '404 Not Found'

    def test_a_mount_is_found_by_script_name(self, start):
        server = start(HELLO + ENVIRON.replace('application', 'other'), 'module = app\nmount = /a=app:other')
        assert server.ask('/x').body == b'hello\n'
        assert eval(server.ask('/x', SCRIPT_NAME='/a').body)['SCRIPT_NAME'] == '/a'


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
MISSING = [name for name, (*_, program) in LANGUAGES.items() if not shutil.which(program)]
NGINX = shutil.which('nginx') or '/usr/sbin/nginx'


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
    if not os.path.exists(NGINX):
        pytest.skip('there is no nginx')
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
        pytest.skip(f'there is no {LANGUAGES[request.param][-1]}')
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
        pytest.skip(f'there is no {LANGUAGES[name][-1]}')
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
    wait_until(lambda: not os.path.exists(f'/proc/{worker}'), 'the end of the program')


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
    if not shutil.which(program):
        pytest.skip(f'there is no {program}')
    option, name, text, broken = {'ruby': ('rack', 'config.ru', CONFIG_RU, 'raise "wont"'),
                                  'perl': ('psgi', 'app.psgi', APP_PSGI, 'die "wont";')}[program]
    (tmp / name).write_text(text)
    server = start(ini=f'{option} = {name}')
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
    for name, why in (('garbage', 'where a header is expected'), ('silent', 'without a head'),
                      ('badstatus', 'bad status'),
                      ('badprogram', "can't be started")):
        answer = server.ask(f'/bin/{name}')
        assert answer.status == '502 Bad Gateway' and why in answer.text, name
    assert 'went wrong' in server.lines
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
    assert server.ask('/bin/outside').status == '403 Forbidden'
    answer = server.ask('/bin/plain.txt')
    assert answer.status == '403 Forbidden' and 'not executable' in answer.text
    for path in ('/bin/../secret', '/bin/%2e%2e/secret', '/bin/..%2fsecret', '/bin//../secret', '/bin/ok%00',
                 '/bin/ok/../x'):
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
    wait_until(lambda: not os.path.exists(f'/proc/{pid}'), 'the end of the program')
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
# 8. Jobs and offload threads

class TestOffload:
    """What a client doesn't take at once costs no worker, and arrives whole."""

    @pytest.mark.parametrize('seek, length', [(0, None), (0, 30000000), (1000, 29999000), (5, 10), (0, 0), (30000000, 0)])
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
            assert read_all(slow[1]).partition(b'\r\n\r\n')[2] == b'x' * 10000000 + b'y' * 10000000
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
# 9. and 10. Worker and master

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
    """Clients that ask all the time, each on new connections; failures are what didn't go as it should."""

    def __init__(self, server, path='hello', clients=4):
        self.server, self.path, self.answered, self.failures, self.bodies = server, path, 0, [], set()
        self.running = True
        self.threads = [threading.Thread(target=self.ask, daemon=True) for _ in range(clients)]
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

    def more(self, requests):
        """Wait for so many more answers."""
        goal = self.answered + requests
        wait_until(lambda: self.answered >= goal or self.failures, f'{requests} more answers')

    def end(self):
        self.running = False
        for thread in self.threads:
            thread.join(PATIENCE)
        return self.failures


class TestProcesses:
    """A worker that ends is replaced, with a line that says why; the others don't notice."""

    def test_the_application_is_loaded_once_and_the_workers_share_it(self, start):
        server = start('import os\nloaded_in = os.getpid()\n' + APPS.replace("b'%d' % os.getpid()", "b'%d' % loaded_in"),
                       'processes = 3')
        assert len(server.workers()) == 3
        assert server.ask('pid').body == b'%d' % server.pid

    def test_lazy_apps_are_loaded_in_each_worker(self, start):
        server = start('import os\nloaded_in = os.getpid()\n' + APPS.replace("b'%d' % os.getpid()", "b'%d' % loaded_in"),
                       'processes = 2\nlazy-apps = true')
        assert int(server.ask('pid').body) in server.workers()

    @pytest.mark.parametrize('path, query, words', [
        ('crash', str(int(signal.SIGKILL)), 'SIGKILL, not sent by us, at GET crash'),
        ('crash', str(int(signal.SIGSEGV)), 'SIGSEGV, not sent by us, at GET crash'),
        ('crash', str(int(signal.SIGABRT)), 'SIGABRT'), ('leave', '', 'exit status 7, at GET leave')])
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
            victims = wait_until(server.workers, 'a worker')
            with contextlib.suppress(ProcessLookupError):
                os.kill(victims[i % len(victims)], signal.SIGKILL)
            server.wait_for('died', i + 1)
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

    def test_threads_serve_at_the_same_time(self, start, tmp):
        server = start(SLOW, 'threads = 3')
        held = [Held(server, tmp, f'fifo{i}') for i in range(2)]
        assert server.ask('hello').body == b'hello\n'
        assert eval(server.ask('environ').body)['wsgi.multithread'] == 'True'
        assert len({answer.release().body for answer in held}) == 1

    def test_kill_9_of_the_master_ends_the_workers_at_once(self, start, tmp):
        server = start(SLOW, 'processes = 3')
        workers = server.workers()
        held = Held(server, tmp)
        server.kill(signal.SIGKILL)
        server.process.wait(PATIENCE)
        wait_until(lambda: sum(os.path.exists(f'/proc/{pid}') for pid in workers) == 1, 'the end of the idle workers')
        assert held.release().body.startswith(b'done by')
        wait_until(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in workers), 'the end of the last worker')

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
        if os.getuid() or not shutil.which('unshare'):
            pytest.skip('unshare of util-linux, as root, is not there')
        (tmp / 'app.py').write_text(HELLO + 'import os\nif not os.fork():\n    if os.fork(): os._exit(0)\n    os._exit(0)\n')
        server = Server(tmp, [])
        server.wait()
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

    def test_those_who_wait_in_the_queue_are_served(self, start, tmp):
        server = start(SLOW)
        held = Held(server, tmp)
        waiting = [connect(server.socket) for _ in range(5)]
        for connection in waiting:
            connection.sendall(packet('hello'))
        server.kill(signal.SIGTERM)
        server.wait_for('stopping')
        held.release()
        for connection in waiting:
            with connection:
                assert Answer(read_all(connection)).body == b'hello\n'
        assert server.wait() == 0

    @pytest.mark.parametrize('numbers', [(signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
    def test_quit_or_a_second_signal_stops_at_once(self, start, tmp, numbers):
        server = start(SLOW, 'vacuum = true')
        held = Held(server, tmp)
        for i, number in enumerate(numbers):
            server.kill(number)
            if i + 1 < len(numbers):
                server.wait_for('stopping')
        assert server.wait() == 0 and not os.path.exists(server.socket)
        held.writer.close()
        held.connection.close()

    def test_a_request_without_end_is_killed_after_the_mercy(self, start):
        server = start(SLOW, 'worker-reload-mercy = 1')
        with connect(server.socket) as connection:
            connection.sendall(packet('deaf'))
            wait_until(lambda: 'S' in pathlib.Path(f'/proc/{server.workers()[0]}/stat').read_text().split()[2], 'sleep')
            server.kill(signal.SIGTERM)
            assert 'had 1 s to finish' in server.wait_for('is killed')
        assert server.wait() == 0

    def test_term_during_the_import_stops(self, start, tmp):
        os.mkfifo(tmp / 'fifo')
        server = start('open("fifo").read()\n' + HELLO, 'vacuum = true', ready=False)
        with open(tmp / 'fifo', 'w'):
            server.kill(signal.SIGTERM)
            assert server.wait() == 0
        assert 'stopped while starting' in server.log and not os.path.exists(server.socket)

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


class TestReload:
    """A reload brings the new code and configuration, and nobody waits for it or is lost."""

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


class TestHarakiri:
    """A request that takes too long is broken off, and the log says where it was."""

    def test_the_client_gets_a_504_and_the_log_the_stack(self, start):
        server = start(SLOW, 'harakiri = 1')
        server.tracebacks_expected = True
        before = server.workers()
        assert server.ask('spin').status == '504 Gateway Timeout'
        assert 'at GET spin for 1' in server.wait_for('harakiri: worker 1')
        assert 'in spin' in server.log
        wait_until(lambda: server.workers() != before, 'a new worker')
        assert server.ask('hello').body == b'hello\n'

    def test_who_does_not_listen_is_killed_a_second_later(self, start):
        server = start(SLOW, 'harakiri = 1')
        server.tracebacks_expected = True
        assert server.ask('deaf').raw == b''
        assert 'harakiri = 1, at GET deaf for 2' in server.wait_for('is killed')
        assert server.ask('hello').body == b'hello\n'

    def test_threads_do_not_reset_each_other(self, start):
        server = start(SLOW, 'harakiri = 1\nthreads = 2')
        server.tracebacks_expected = True
        load = Load(server, clients=1)
        assert server.ask('deaf').raw == b''
        server.wait_for('is killed')
        load.end()

    def test_an_idle_server_does_not_wake_up(self, start):
        server = start(ini='processes = 2\nharakiri = 60')
        def switches():
            return [line for pid in (server.pid, *server.workers()) for line in
                    pathlib.Path(f'/proc/{pid}/status').read_text().splitlines() if line.startswith('voluntary')]
        server.ask()
        before = wait_until(lambda: (a := switches()) == (time.sleep(0.1), switches())[1] and a, 'rest')
        select.select([], [], [], 2)
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

    def test_a_lifetime_ends(self, start):
        server = start(APPS, 'max-worker-lifetime = 1')
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

    def test_the_queue_of_a_unix_socket_and_of_tcp_is_seen(self, start, tmp):
        port = free_port()
        server = start(SLOW, f'socket = s\nsocket = 127.0.0.1:{port}\nprocesses = 1\nstats = stats')
        held = Held(server, tmp)
        with contextlib.ExitStack() as stack:
            for address in (server.socket,) * 3 + (('127.0.0.1', port),) * 2:
                stack.enter_context(connect(address))
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

    def test_usr2_tells_what_each_worker_does(self, start, tmp):
        server = start(SLOW)
        held = Held(server, tmp)
        server.kill(signal.SIGUSR2)
        server.wait_for('in slow')
        held.release()
        assert server.wait_for(r'worker 1 \(pid .*GET slow')

    def test_the_request_line_is_uwsgis(self, start, tmp):
        server = start()
        server.ask('/a?b', REMOTE_USER='joe')
        assert re.fullmatch(
            r'\[pid: \d+\|app: 0\|req: 1/1\] 127\.0\.0\.1 \(joe\) \{\d+ vars in \d+ bytes\} \[\w+ \w+ +\d+ [\d:]+ \d+\] '
            r'GET /a\?b => generated 6 bytes in \d+ msecs \(HTTP/1\.1 200\) 2 headers in \d+ bytes '
            r'\(1 switches on core 0\)', server.wait_for('pid: '))


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

    def test_the_parent_tells_of_a_failed_start(self, tmp):
        code, output = run(tmp, '--socket', 's', '--module', 'nowhere', '--daemonize', 'log')
        assert code == 22 and "there is no module 'nowhere'" in output

    def test_the_log_follows_its_name(self, start, tmp):
        server = start(ini='logto = log', ready=False)
        wait_until(lambda: (tmp / 'log').exists() and 'ready' in (tmp / 'log').read_text(), 'ready')
        os.rename(tmp / 'log', tmp / 'old')
        server.kill(signal.SIGUSR1)
        wait_until((tmp / 'log').exists, 'the new log')
        wait_until(lambda: server.ask('/there') and '/there' in (tmp / 'log').read_text(), 'a line in the new log')

    @pytest.mark.skipif(os.getuid() != 0 or not os.path.exists('/usr/bin/python3'), reason='needs root and /usr/bin/python3')
    def test_root_is_left_for_good_before_the_application_is_loaded(self, start, tmp):
        os.chmod(tmp, 0o777)
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

    def test_a_socket_of_systemd_is_used_and_never_removed(self, start, tmp):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp / 'a'))
            listener.listen()
            (tmp / 'app.py').write_text(HELLO)
            script = ('import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS="1", '
                      'LISTEN_PID=str(os.getpid())); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])')
            process = subprocess.Popen([sys.executable, '-c', script, str(listener.fileno()), str(MINUWSGI), '--module', 'app',
                                        '--vacuum'], cwd=tmp, pass_fds=[listener.fileno()], stderr=subprocess.PIPE)
        try:
            lines = iter(process.stderr.readline, b'')
            assert any(line.startswith(b'ready') for line in lines)
            assert ask(str(tmp / 'a')).body == b'hello\n'
            process.send_signal(signal.SIGHUP)
            assert any(line.startswith(b'ready') for line in lines)
            assert ask(str(tmp / 'a')).body == b'hello\n'
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
            process.stderr.close()
        assert (tmp / 'a').exists()
