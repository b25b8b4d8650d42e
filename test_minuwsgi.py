"""Tests of minuwsgi: what it promises, in the order of the module.

    python3 -m pytest test_minuwsgi.py                  all
    python3 -m pytest test_minuwsgi.py -k vacuum        those with a word in their name

A test starts the real server in a directory of its own and talks to it over real sockets. It waits
for events (a line in the log, the end of a process), never for time to pass. At its end the log
must hold no traceback that the test didn't ask for, and no process may be left.
"""
import contextlib
import grp
import hashlib
import http.client
import http.cookiejar
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
import urllib.error
import urllib.parse
import urllib.request

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
# 12. Behind nginx, with real applications

NGINX = shutil.which('nginx', path=os.environ['PATH'] + ':/usr/sbin:/usr/local/sbin')
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
    own: {name: the lines of a server block, where a uwsgi_pass comes with Debian's uwsgi_params}."""

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
        http = re.sub('(?=uwsgi_pass )', 'include /etc/nginx/uwsgi_params; ', http)
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
        both = 'location / {{ uwsgi_request_buffering {0}; uwsgi_buffering {0}; uwsgi_pass unix:{1}/s; }}'
        front = Nginx(directory, {
            'uwsgi': both.format('on', directory),
            'unbuffered': both.format('off', directory),
            'http': 'location / { proxy_pass http://kept; proxy_http_version 1.1; proxy_set_header Connection ""; }',
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
        answer = site.ask(way, '/who?a=%20b&c', Host='kept' if way == 'http' else 'localhost')
        assert answer.content.decode() == f"GET  /who a=%20b&c 127.0.0.1 {'kept' if way == 'http' else 'localhost'} http"

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

    def test_the_log_counts_the_bytes_of_each_response(self, site, way):
        server = site.http if way == 'http' else site.uwsgi
        for times in 1, 2:
            site.ask(way, f'/cookie?{way}', Cookie='x')
        assert '=> generated 1 bytes' in server.wait_for(rf'/cookie\?{way} ', 2)

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


def test_proxy_pass_to_a_uwsgi_socket_is_explained_in_the_browser(site):
    answer = site.ask('wrong')
    assert answer.status == 400 and b'in nginx use uwsgi_pass, not proxy_pass' in answer.content
    site.uwsgi.wait_for('bad request: .*use uwsgi_pass')


def test_a_socket_that_nginx_may_not_open_is_a_502_with_permission_denied(start, nginx, tmp):
    if os.getuid():
        pytest.skip('only root can run nginx as another user')
    start()
    front = nginx({'site': f'location / {{ uwsgi_pass unix:{tmp}/s; }}'}, user='nobody nogroup')
    assert front.ask('site').status == 502
    assert f'connect() to unix:{tmp}/s failed (13: Permission denied)' in front.log()
    os.chown(tmp / 's', -1, grp.getgrnam('nogroup').gr_gid)                     # as chown-socket would
    assert front.ask('site').status == 200


@pytest.mark.parametrize('way', ['uwsgi', 'http'])
def test_three_reloads_under_load_lose_no_request(start, nginx, tmp, way):
    server = start(ini='processes = 2' if way == 'uwsgi' else 'processes = 2\nsocket = s2', http=way == 'http')
    front = nginx({'site': f'location / {{ uwsgi_pass unix:{tmp}/s; }}' if way == 'uwsgi' else
                   'location / { proxy_pass http://kept; proxy_http_version 1.1; proxy_set_header Connection ""; }'},
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
        front = nginx({'site': 'location / { uwsgi_pass three; uwsgi_next_upstream error timeout; }'}, 'upstream three { '
                      + ' '.join(f'server 127.0.0.1:{port};' for port in ports) + ' }\n')
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
        front = nginx({'site': f'location / {{ uwsgi_pass unix:{tmp}/minuwsgi.sock; }}'})
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
        return self.get(path, head + content + b'\r\n--XX--\r\n', Content_Type='multipart/form-data; boundary=XX', **headers)


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
