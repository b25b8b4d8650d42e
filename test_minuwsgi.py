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
import os, socket
server = socket.socket(fileno=0)
while True:
    client, _ = server.accept()
    same = os.path.sameopenfile(0, 3)
    client.sendall(f'{os.environ["LISTEN_FDS"]} {int(os.environ["LISTEN_PID"]) == os.getpid()} {same}'.encode())
    client.close()
'''


def test_a_program_finds_the_sockets_as_from_systemd_and_dies_with_the_master(start, tmp):
    (tmp / 'serve.py').write_text(ACCEPT)
    server = start(ini=f'worker-exec = {sys.executable} serve.py\nsocket = s\nsocket = t')
    assert exchange(server.socket, b'') == b'2 True True'
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
