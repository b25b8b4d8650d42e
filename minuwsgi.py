"""minuwsgi: an application server after uWSGI's model, in one file of Python's standard library.

    python3 minuwsgi.py example.ini             run; --help lists the options, README.md the rest
    python3 -m minuwsgi example.ini             the same from its bytecode: starts faster, takes less memory
    python3 minuwsgi.py --check site.ini        look for all that would stop a start

The parts, from the leaves to main(); each uses only what stands above it, except that Core and Worker, and Stats and
Master, know each other. If you have an hour, and want to know how a preforking server works, read the parts with a *,
without Expected and Body, and the openings of the others.

     1   Options and the INI dialect    settings from files and the command line become a Config
     2   Waiting, and the log           RWF_NOWAIT; one line, one write; a log that nobody reads holds nobody up
     3 * Sockets                        Listener: bind with the right mode, refuse what isn't ours, vacuum
     4 * The uwsgi protocol             the packet that nginx sends, read plainly (unpack_vars) and by guess (Expected)
     5   HTTP/1.1                       a head becomes the same environ
     6 * WSGI                           input, Response, and the jobs that send it
     7   Static files
     8   Other languages                CGI, Ruby and Perl under the same master
     9 * Offload threads                a thread finishes the jobs for which a worker should not wait
    10 * Serving requests               Core.serve(), the hot path; Core.wait() for several sockets and HTTP
    11 * Worker                         the process around it, which can be told to stop at any moment
    12   Loading the application        it is found, or said where it was looked for
    13   Statistics                     what each worker does, as JSON and for Prometheus
    14 * Master                         forks, watches, replaces, reloads
    15   Command line                   main(), and the order in which a server starts

The life of a request. A worker waits in accept() (Core.serve). It reads the packet into its Row of the scoreboard,
where the master can see it; the packet becomes environ (Expected, or Expected.rest). The application gets environ and
Response.start_response, which checks the head. A small body leaves with the head in one write (send_small), and the
connection is closed: accept4, preadv2, write, close; one more write is the line of the request log. What is larger
becomes a job (Response.finish): run_a_while() runs it for a moment; then Offloader.take() owns job and descriptor, and
the worker takes the next request. Over HTTP, Core.wait() stands in for accept(): it watches the kept connections too,
and returns one whose head is whole; read_request() makes environ of it, and keep() parks it again. Exceptions end in
Core.failed(): 400 and the like for a bad request, nothing for a client that left, 500 or a cut connection and a
traceback in the log for an application that failed.

The life of a signal. In the master it becomes a byte in a pipe (catch_signals); Master.run() wakes, on_signal() notes
what is wanted, and converge() makes what is into what should be: it takes note of the dead (reap), starts what is
missing (spawn), replaces what must go, one worker after the other, and kills what is overdue (keep_time). Until there
is a Master, a stop is an exception (Stopped). A worker that is told to stop (Worker.on_stop) finishes its request; then
its accept() or Core.wait() meets a dead end. Who comes after that is refused (refuse_newcomers). For a reload a child
tries the new code (try_reload); then the master executes itself anew (after_proof), inherits sockets and old workers
(start_and_run), and replaces the workers.

Who owns what. The master: sockets and their files, the pidfile, the workers' lifelines. A worker: the connection it
accepted, until it closes it or gives it to an Offloader, which calls done() (see let_go) at the end of the job: that
closes it, or parks it if HTTP keeps it. A job closes only the file that it sends. The application: what it opened, and
close() of its result is always called. A process that the application forks: nothing of all this (ForkGuard).
"""
import collections
import contextlib
import errno
import functools
import gc
import io
import itertools
import math
import mmap
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from wsgiref.util import FileWrapper

__version__ = '0.1'


# ---------------------------------------------------------------------------------------------
# 1. Options and the INI dialect
#
# uWSGI's configuration is one flat list of lines (name, value, where it stands) from the environment (UWSGI_*), the
# command line and INI files. Config goes over it twice. First it takes the lines in their order; a line may bring
# others, which come next (an included file, an if or for block). Then it judges each line, fills in $(ENV), @(file)
# and %(name), and uses it: it sets the option. Last it looks for options that do nothing beside others (compare). The
# fate of a line: used, always (needs no switch here), unsupported, variable (only a name for %(name)) or unknown.

class ConfigError(Exception):
    """A mistake in the configuration; its text says where, what and what to do."""


# Both tables are texts: a line without | is a heading, an indented one continues the row above.
#
# OPTIONS: names (the first is ours, the others are accepted, -x is the short form), kind of value (with + the option
# may be repeated, and its values gather), default, meaning. Parser, defaults, --help and README's table come from here.
OPTIONS = '''
Application
module wsgi -w | word | | import it: package.module or package.module:callable
wsgi-file file | path | | run it from a Python file
callable | word | application | its name in there, where `module` doesn't say
mount | pair+ | | /prefix=module:callable or /prefix=file.py
manage-script-name | flag | false | move the longest mount that fits from PATH_INFO to SCRIPT_NAME
chdir | path | | go to this directory first
chdir2 | path | | go to this directory when the application is loaded
pythonpath pp python-path | path+ | | put this directory in front of sys.path (may hold *)
virtualenv home venv pyhome -H | path | | run with the Python of this virtual environment
env | env+ | | NAME=value for the application
import pyimport py-import python-import | word+ | | import this module before the application
pyargv | text | | sys.argv[1:] for the application
lazy-apps lazy | flag | false | load the application in each worker, not once before the fork
py-autoreload py-auto-reload python-autoreload python-auto-reload
    | seconds | 0 | look for changed modules in this interval, and reload
worker-exec worker-exec2 | text | | run this command as the workers, the socket as its stdin
Sockets
socket -s | address+ | | listen here: path, host:port, :port, [v6]:port, @abstract, fd://N
protocol socket-protocol | protocol | uwsgi | what `socket` speaks: uwsgi or http
uwsgi-socket | address+ | | speak the uwsgi protocol here
http-socket http http11-socket httprouter | address+ | | speak HTTP/1.1 here
chmod-socket chmod -C | octal | | mode of unix sockets (default 660; without a value 666)
chown-socket | word | | owner of unix sockets: user or user:group
umask | octal | | umask of the server and the application
listen -l | positive | 1024 | how many connections may wait
vacuum | flag | false | remove unix sockets and the pidfile at the end
socket-timeout -z | positive | 4 | seconds for the head of a request, and for a client that makes no progress
http-timeout | positive | 60 | seconds for an idle client, or one that reads slowly while no worker waits
limit-post | number | 0 | the largest request body in bytes (0: any)
trust-proxy | network+ | | believe X-Forwarded-For and -Proto from 10.0.0.1, 10.0.0.0/8, or a unix socket
add-header | header+ | | a header for every response: Name: value
Processes
master -M | flag | true | `false`: no fork, one process that serves, for a debugger
processes workers -p | positive | 1 | how many workers
threads | positive | 1 | how many requests a worker serves at once
offload-threads offload-thread | number | 0 | threads in a worker that finish large responses (at least 1)
cheaper | number | 0 | how many workers there are at least; the rest come when needed
cheaper-initial | number | 0 | how many workers there are at the start
cheaper-step | positive | 1 | how many workers are added at a time
cheaper-overload | number | 3 | seconds of calm until one worker less, or, for backlog, waiting connections
cheaper-algo | algorithm | spare | spare: more when all are busy; backlog: when too many connections wait
idle | seconds | 0 | seconds without a request, for `die-on-idle`
die-on-idle | flag | false | end the server then; with socket activation it comes back
uid | word | | user to become when the sockets are bound
gid | word | | group to become
max-fd | number | 0 | limit of open files in each process
limit-as | number | 0 | limit of address space of each process in MB
pidfile pidfile2 safe-pidfile safe-pidfile2 | path | | write the master's pid here
daemonize daemonize2 -d | path | | go to the background, log to this file
auto-procname | flag | false | name the processes: uWSGI master, uWSGI worker 1
procname | text | | name of the workers
procname-master | text | | name of the master
procname-prefix | text | | put this before the names
procname-prefix-spaced | text | | the same, and a blank
procname-append | text | | put this after the names
Recycling, reload and stop
harakiri -t | seconds | 0 | seconds that a request may take; then it is ended and logged
harakiri-graceful-timeout | seconds | 1 | seconds from its end by an exception to SIGKILL
max-requests -R | number | 0 | replace a worker after so many requests
max-requests-delta | number | 0 | so many more for each next worker
max-worker-lifetime | seconds | 0 | replace a worker after so many seconds
max-worker-lifetime-delta | seconds | 0 | so many more for each next worker
reload-on-rss evil-reload-on-rss | number | 0 | replace a worker whose resident memory exceeds so many MB
reload-on-as evil-reload-on-as | number | 0 | replace a worker whose address space exceeds so many MB
worker-reload-mercy reload-mercy | positive | 60 | seconds that a worker has to finish before it is killed
die-on-term | flag | true | `false`: SIGTERM reloads, as in uWSGI 2.0
touch-reload | path+ | | reload when this file changes
touch-chain-reload touch-workers-reload | path+ | | the same (a reload is always one worker after another)
Log and statistics
logto logto2 | path | | log to this file
logger | log+ | | log to file:PATH or stdio
req-logger logger-req | log+ | | the same for the lines of requests alone
log-maxsize | number | 0 | rename the log when it has so many bytes, and start a new one
log-backupname | path | | name for it then (default: the time is added)
log-date logdate | text | | put the time before each line: true, or a strftime format (in a file %%d, not %d)
log-format logformat | text | | format of the lines of requests, with %(uri), %(status) …
log-x-forwarded-for | flag | false | log the address in X-Forwarded-For
disable-logging -L | flag | false | no line for each request
log-4xx | flag | false | but for those that failed with 4xx
log-5xx | flag | false | but for those that failed with 5xx
log-slow | number | 0 | but for those that took so many milliseconds
log-zero | flag | false | but for those with an empty response
log-big | number | 0 | but for those with a response of so many bytes
stats stats-server | address | | give the state of the workers as JSON here
stats-http | flag | false | over HTTP
Static files, CGI, other languages
static-map | pair+ | | /prefix=directory or file
static-map2 | pair+ | | the same, with the prefix as a part of the path
check-static static-check | path+ | | serve what is in this directory before the application is asked
static-index | word+ | | file to serve for a directory
static-expires | text+ | | `pattern seconds`: how long browsers may keep files
static-safe | path+ | | a directory that symbolic links may lead to
cgi | text+ | | [/prefix=]directory or script
cgi-helper | pair+ | | .ext=interpreter
cgi-allowed-ext | word+ | | run files with this extension alone
cgi-index | word+ | | script to run for a directory
cgi-timeout | positive | 60 | seconds without output until a script is killed
rack | path | | config.ru of a Ruby application
psgi | path | | a Perl application
Configuration
ini include config | path+ | | read this file, or file:section
inherit | path+ | | the same, after all other files
set set-ph set-placeholder -S | text+ | | NAME=value: an option, or a variable for %(NAME)
print iprint | text+ | | log this text at the start
strict | flag | false | an unknown option stops the start
show-config | flag | false | print each line and what becomes of it; on the command line: and exit
check | flag | false | look for all that would stop a start, load the application, exit
'''

# FATES: what becomes of other names, and why. timer-* stands for all names with this word, cron* for those
# with a word that begins so (cron2, unique-cron), name=value* for such values. The first that fits counts.
FATES = '''
always
need-app | a start without an application fails
enable-threads -T | the application's threads just run
single-interpreter -i | there is one interpreter
thunder-lock lock-engine ftok persistent-ipcsem | the kernel wakes one worker for a connection
buffer-size -b http-buffer-size max-vars -v response-headers-limit | a head may have 64 KiB
ignore-sigpipe ignore-write-errors disable-write-exception write-errors-* | a client that leaves is no error
hook-master-start=unix_signal:15* | SIGTERM is a graceful stop
plugin=python* plugins=python* plugin=http* plugins=http* plugin=cgi* plugins=cgi* plugin=psgi* plugins=psgi*
    plugin=rack* plugins=rack* plugins-dir plugin-dir autoload | built in
log-master-* threaded-logger log-reopen | a line is one write, whoever writes it; the log follows its name
http-keepalive http-auto-chunked http-chunked-input http-raw-body http-manage-expect http-processes http-workers
    http-cheap http-events http-quiet http-harakiri http-connect-timeout http-uid http-gid chunked-input-*
    | the workers speak HTTP/1.1 themselves and keep connections
http-headers-timeout send-timeout-* write-timeout-* | socket-timeout holds for it
post-buffering post-buffering-bufsize | a body is read when the application asks for it
harakiri-verbose harakiri-graceful-signal arh-* no-harakiri-* py-tracebacker backtrace-depth | harakiri logs the stack
memory-report -m stats-min* stats-no-* metrics-no-cores | stats is short, and has the memory of each worker
cheaper-busyness-* | see cheaper-algo: spare or backlog
wsgi-strict wsgi-env-* wsgi-disable-file-wrapper py-call-* no-orphans close-on-exec close-on-exec2 no-default-app
    tcp-nodelay no-defer-accept no-fd-passing skip-zero disable-sendfile honour-stdin http-server-name-as-http-host
    drop-after-init check-interval forkbomb-delay max-apps mem-collector-freq min-worker-lifetime
    | it is so, or the server does what fits
unsupported
attach-* daemons-honour-stdin emperor* vassal* heartbeat notify-socket | a systemd unit each
cron* timer-* rbtimer signal-rbtimer | a systemd timer or cron
chroot pivot* refork* re-fork* unshare* namespace* ns-* setns* jailed tuntap* cgroup* limit-nproc prio cpu-affinity
    never-swap ksm envdir-* unenv | the systemd unit, or a container
gevent* websocket* async ugreen* loop greenlet asyncio tornado | threads; for async code an ASGI server
cheap cheaper-rss-limit-* harakiri-queue-threshold worker-mount | cheaper, reload-on-rss, harakiri, mount
hook-* call-* exec-* mount-* umount-* mountpoint* wait-for-* wait-i* file-write | ExecStartPre=, or a start script
master-as-root immediate-uid immediate-gid add-gid no-initgroups drop-after-apps | uid and gid
log-route log-req-route encoder-* log-prefix log-syslog log-socket log-truncate log-ioerror log-micros log-sendfile
    strftime-* rsyslog-* logfile-* logrotate-* logreopen-* | log-format, log-4xx, log-5xx, log-slow, logger; journald
alarm* metric* carbon* rrdtool* snmp* stats-push* nagios reload-on-exception* reload-on-fd-* catch-exceptions
    exception-handler | a monitor that reads stats and the log
route* vhost* error-page* header-* proxy-protocol* ignore-script-name https* ssl-* sni* suwsgi-socket http-* fastrouter*
    rawrouter* sslrouter* forkptyrouter* corerouter* subscri* unsubscribe* st multicast* zerg* weight-* static-expires-*
    static-gzip-* static-skip-ext file-serve-mode fileserve-mode mime* honour-range check-static-docroot upload-progress
    | nginx: location, rewrite, add_header, upstream, gzip, TLS
mule* farm spooler -Q spooler* cache* queue* sharedarea -A py-sharedarea | celery, rq, redis, nginx's proxy_cache
eval optimize -O no-site py py-program* py-executable py-sys-executable py-auto-reload-ignore python python-version
    python-raw python-worker-override pyrun pyshell* pymodule-alias post-pymodule-alias config-py web3* pump* wsgi-lite*
    pecan paste* ini-paste* symcall* dlopen shared-import shared-py* test -J thread-stack* threads-stack*
    | options of the python3 that starts minuwsgi, or a small wsgi-file
php* ruby* rbrequire lua* perl* jvm* mono* v8* go-* glusterfs* gridfs* rados* webdav* xslt* ldap* cgi-mode -c cgi-*
    | the language's own server, or cgi with cgi-helper, cgi-index, cgi-allowed-ext
fastcgi* scgi* raw-* udp modifier* abstract-socket -a map-socket socket-* reuse-port freebind so-keepalive tcp-fast*
    | socket, which speaks uwsgi or HTTP and may be @name; net.* of sysctl
xml -x xmlconfig yaml -y yml json -j js blacklist-* whitelist-* declare-option* fallback-config inject-* resolve get
    exit | an INI file with plain options
stop reload pause suspend resume help -h usage version master-fifo fs-* signal-* signals-*
    | --stop, --reload, --help, --version; touch-reload
ping ping-timeout reaper -r safe-fd fd-safe no-server no-threads-wait body-read-warning command-mode force-* clock locks
    rpc-max profiler mode extract connect-and-read dump-options print-sym* binary-* binsh privileged-* unprivileged-*
    skip-atexit* use-abort exit-on-reload shutdown-sockets propagate-touch reload-os-env wsgi-accept-buffer* flock*
    start_response-nodelay legion* lord* | nothing, it is left out
plugin plugins need-plugin need-plugins build-plugin dot-h cflags list-* | nothing is pluggable
unknown
<<<<<<<* ======* >>>>>>>* | is a mark of a merge conflict: choose one side
{{* {%* <%* | is a template that wasn't filled in
autostart autorestart redirect_stderr stdout_logfile* stderr_logfile* startsecs stopsignal | belongs to supervisord
user group directory environment command | belongs to supervisord or systemd; here it's uid, gid, chdir, env
uwsgi_* proxy_* server_name location upstream server access_log error_log client_max_body_size | belongs to nginx
ExecStart* Restart* WantedBy Type KillSignal WorkingDirectory User Group After | belongs to a systemd unit
use paste.* [* | belongs to PasteDeploy or another program
'''


def table(text):
    """(heading, cells) of each row of a table."""
    for line in text.strip().replace('\n    ', ' ').split('\n'):
        if '|' not in line:
            heading = line
        else:
            yield heading, [cell.strip() for cell in line.split('|')]


def leading_number(text):
    """The digits at the front, as C's atoi() reads them, or None."""
    text = text.lstrip()
    digits = ''.join(itertools.takewhile(str.isdecimal, text[text[:1] in ('-', '+'):]))[:18]
    return int(digits) * (-1 if text[0] == '-' else 1) if digits else None


BOOLEANS = {'true': True, 'yes': True, 'on': True, '': True, 'false': False, 'no': False, 'off': False}

# Kinds of values: what is expected, the conversion (or a ValueError), what must hold of its result.
KINDS = {
    'flag': ('true or false', lambda text: BOOLEANS.get(text.lower(), text != '0'), None),     # all else means yes
    'number': ('a whole number', leading_number, lambda number: 0 <= number < 1 << 43),
    'positive': ('a whole number greater than 0', leading_number, lambda number: 0 < number < 1 << 43),
    'seconds': ('a number of seconds', lambda text: float(text) if '.' in text else leading_number(text),
                lambda time: 0 <= time < 1e9),
    'octal': ('an octal mode such as 660', lambda text: 0o666 if text == '1' or BOOLEANS.get(text.lower()) else
              int(text, 8), lambda mode: 0 <= mode <= 0o777),
    'algorithm': ('spare or backlog', lambda text: 'backlog' if text == 'backlog' else 'spare', None),
    'protocol': ('uwsgi or http', lambda text: text.replace('http11', 'http'), lambda name: name in ('uwsgi', 'http')),
    'network': ('an address or a network such as 10.0.0.0/8',
                lambda text: __import__('ipaddress').ip_network(text, strict=False), None),
    'pair': ('name=value', str, lambda pair: pair.find('=') > 0),
    'env': ('NAME=value', str, lambda pair: pair.find('=') > 0),
    'header': ('Name: value', str, lambda line: line.find(':') > 0),
    'path': ('a path', lambda text: text or None, None),
    'word': ('a name', lambda text: text or None, None),
    'address': ('a path or host:port', lambda text: text or None, None),
    'log': ('file:PATH or stdio', lambda text: text.partition('logfile=')[2].partition(',')[0]
            or text.partition('file:')[2] or None, None),
    'text': ('any text', str, None)}

# What uWSGI takes literally and nobody means.
DOUBTS = {'{{': "a template that wasn't filled in", '$(': 'there is no such variable in the environment',
          '$': 'variables of the environment are written $(NAME)', '%(': 'there is no such option or variable',
          '~/': 'nothing puts your home directory here, write it out'}
LITERAL = 'text', 'env', 'header'       # kinds whose values may hold anything


class Option:
    """A row of OPTIONS."""

    def __init__(self, group, names, kind, default, meaning):
        self.group, self.names, self.meaning = group, names.split(), meaning
        self.name, self.attribute = self.names[0], self.names[0].replace('-', '_')
        self.kind, self.many = kind.rstrip('+'), kind[-1] == '+'
        self.expected, self.convert, self.allowed = KINDS[self.kind]
        self.default = () if self.many else self.convert(default) if default else None

    def read(self, value, doubts):
        """The value for the attribute; an exception if it can't be meant. What is odd about it is added to doubts."""
        doubts += [doubt for mark, doubt in DOUBTS.items() if mark in value and self.kind not in LITERAL][:1]
        if value[:1] in ('"', "'") and value[-1:] == value[:1] and self.kind != 'text':
            doubts.append('the quotes are a part of the value; leave them out')
        boolean, numeric = value.lower() in BOOLEANS, self.kind in ('number', 'positive', 'seconds')
        result = self.default or 0 if numeric and boolean else self.convert(value)
        if self.allowed and not self.allowed(result):
            raise ValueError
        if self.kind == 'address' and value.isdecimal():
            doubts.append(f'this is a path; a port is written :{value}')
        if (boolean and self.kind in ('path', 'word', 'address')
                or numeric and not (value.isdecimal() or type(result) is float)
                or self.kind == 'algorithm' and result != value
                or self.kind == 'flag' and not boolean and not value.isdecimal()
                or self.kind == 'log' and value not in ('stdio', f'file:{result}')):
            doubts.append(f'{self.expected} is expected; ' + ('left out' if result is None else f'taken as {result}'))
        return result


ROWS = [Option(group, *cells) for group, cells in table(OPTIONS)]
BY_NAME = {name: option for option in ROWS for name in option.names}
PATTERNS = {pattern: (fate, reason) for fate, (names, reason) in table(FATES) for pattern in names.split()}


def glob_sorted(pattern):
    import glob
    return sorted(glob.glob(pattern))


def substitute(opening, value, replacement):
    """Replace each opening...) (parentheses balanced) by replacement(...); None leaves it as it is."""
    done = ''
    while True:
        before, _, rest = value.partition(opening)
        depth = 1
        for end, char in enumerate(rest):
            depth += (char == '(') - (char == ')')
            if not depth:
                break
        else:
            return done + value
        new = replacement(rest[:end])
        done += before + (f'{opening}{rest[:end]})' if new is None else new)
        value = rest[end + 1:]


def read_file(name):
    """The content of a file, less one line end."""
    with open(name, encoding='utf-8-sig', errors='surrogateescape') as file:
        text = file.read()
    if '\0' in text:
        raise ValueError('this is no text in UTF-8; save it as such')
    return text.removesuffix('\n')


def read_if_there(name):
    with contextlib.suppress(OSError, ValueError):
        return read_file(name)


def magic(text, first, this):
    """Fill in %n, %d … for this (file, section), %N, %D … for the first; an unknown one stays (uWSGI drops it)."""
    values = {'v': os.getcwd(), 'V': __version__, 'h': socket.gethostname(), 'k': os.cpu_count(),
              't': int(time.time()), 'u': os.getuid(), 'g': os.getgid(), '\0': '%'}
    for letters, (file, section) in ('OPSNEDCX', first), ('opsnedcx0123456789', this):
        path = os.path.abspath(file)
        directory, base = os.path.split(path)
        stem, extension = os.path.splitext(base)
        values.update(zip(letters, [
            file, path, base, stem, extension[1:], os.path.join(directory, ''), os.path.basename(directory),
            '' if section == 'uwsgi' else section, *directory.strip('/').split('/'), *[''] * 10]))
    before, *rest = text.replace('%%', '%\0').split('%')
    return before + ''.join(str(values.get(part[:1], '%' + part[:1])) + part[1:] for part in rest)


def sections_of(file, text):
    """{section: [(name, value, where)]} of an INI file; None stands for what is in front of the first section."""
    sections = {None: (lines := [])}
    for number, line in enumerate(map(str.strip, text.split('\n')), 1):
        if line[:1] == '[':
            lines = sections.setdefault(line[1:].partition(']')[0].strip(), [])
        elif line and line[0] not in ';#':
            name, _, value = map(str.strip, line.partition('='))
            lines.append((name, value, f'{file}:{number}'))
    return sections


RELOADED = 'MINUWSGI_RELOAD'            # the variable that hands state to the new image (part 14)

# What `if-file = X` and the like ask of X; what `if-env` and `if-opt` find is the text for %(_).
TESTS = {'file': os.path.isfile, 'dir': os.path.isdir, 'directory': os.path.isdir, 'exists': os.path.exists,
         'hostname': lambda name: socket.gethostname() == name, 'reload': lambda _: RELOADED in os.environ,
         'plugin': lambda name: name.startswith(('python', 'http', 'cgi')), 'env': os.environ.get, 'opt': None}
LOOPS = {'for': str.split, 'for-glob': glob_sorted,
         'for-readline': lambda name: (read_if_there(name) or '').splitlines(),
         'for-times': lambda times: [str(i + 1) for i in range(min(leading_number(times) or 0, 10000))]}
BLOCKS = {**LOOPS, **{prefix + test: TESTS[test] for test in TESTS for prefix in ('if-', 'if', 'if-not-')}}
ENDS = 'endif', 'end-if', 'endfor', 'end-for', 'end'


@functools.lru_cache(1000)
def fate(name, value=''):
    """(fate, reason): what becomes of a line."""
    if name in BY_NAME or name in BLOCKS or name in ENDS:
        return 'used', ''
    for pattern in PATTERNS:
        text = f'-{name}={value}' if '=' in pattern else f'-{name}-'
        if name == pattern or pattern[-1] == '*' and f'-{pattern[:-1]}' in text:
            return PATTERNS[pattern]
    return 'unknown', ''


@functools.lru_cache(1000)
def describe(name, value=''):
    """What to say of a line that does nothing."""
    import difflib
    kind, reason = fate(name, value)
    first, _, rest = name.partition(' ')
    nearly = [one for one in ('-'.join(name.lower().replace('_', '-').split()), name.rstrip(' :')) if one in BY_NAME]
    if rest and first.rstrip(':') in BY_NAME and not nearly:
        text = f'{rest.strip()}={value}' if value else rest.strip()
        return f"there is no '=' behind the name: write {first.rstrip(':')} = {text}"
    known = [*BY_NAME, *(one for one in PATTERNS if PATTERNS[one][0] != 'unknown' and one[-1] != '*')]
    similar = [one for one in known if one[:1] == first[:1]]    # the first letter is seldom wrong
    meant = (nearly or [long for long, short in zip(known, known[1:]) if short == f'-{name}']       # p, without -
             or difflib.get_close_matches(first, similar, 1, 0.9 if reason else 0.75)
             or [long for long in known if name and long.startswith(f'{name}-')])                   # harakiri-graceful
    hint = f", did you mean '{meant[0]}'?" if meant and meant[0] != name else ''
    if reason:
        instead = "isn't supported; instead: " if kind == 'unsupported' else ''
        return f"'{name or '=' + value}' {instead}{reason}" + (hint if meant and meant[0] in BY_NAME else '')
    return f"unknown option '{name}'{hint}"


COMMAND_LINE = 'command line'


def target(argument):
    """The option that an argument without a name is the value of, or None (a path, host:8000, or %H:%M)."""
    if argument.endswith('.ini') or '.ini:' in argument:
        return 'ini'
    if argument.endswith(('.py', '.wsgi')):
        return 'wsgi-file'
    named = ':' in argument[1:] and not {'/', '%'}.intersection(argument) and not argument[-1].isdigit()
    return 'module' if named else None


def command_line(arguments):
    """Arguments as lines: options (--name value, --name=value, -x value), then files and module:callable."""
    rest, lines, targets = list(arguments), [], []
    while rest:
        argument = rest.pop(0)
        if argument[:1] != '-':
            if not target(argument):
                raise ConfigError(f'command line: what is {argument!r}? FILE.ini, FILE.py or MODULE:NAME is expected')
            targets.append((target(argument), argument, COMMAND_LINE))
            continue
        name, equals, value = argument[2:].partition('=')
        if argument[:2] != '--':
            name, equals, value = argument[:2], argument[2:], argument[2:].lstrip('=')
        option = BY_NAME.get(name)
        optional = not option or option.kind == 'octal' or option.name == 'log-date'        # -C alone is 666
        if not option and fate(name)[0] == 'unknown':
            raise ConfigError(f'command line: {argument}: {describe(name)}; see --help')
        if not equals and not (option and option.kind == 'flag'):
            if rest and rest[0][:1] != '-' and not (optional and target(rest[0])):
                value = rest.pop(0)
            elif not optional:
                raise ConfigError(f'command line: {argument} needs a value: {option.expected}')
        lines.append((option.name if argument[:2] != '--' and option else name, value, COMMAND_LINE))
    return lines + targets


def is_secret(name):
    return any(part in name.lower() for part in ('pass', 'secret', 'key', 'token', 'credential', 'dsn'))


class Setting:
    """One line of the configuration, its fate, and what there is to say of it."""

    def __init__(self, name, value, where):
        self.name, self.value, self.where = name, value, where
        self.fate, self.reason = fate(name, value)
        self.warnings, self.errors = [], []
        literal = name in BY_NAME and BY_NAME[name].kind in LITERAL or is_secret(name)
        whole = ' '.join(value.split())
        kept = ' '.join(itertools.takewhile(lambda word: word[0] not in ';#', value.split())).rstrip(';')
        if kept != whole and self.fate in ('used', 'unknown') and not literal:
            self.value = kept                           # uWSGI keeps the comment in there
            comment = whole[len(kept):].strip()
            self.warnings.append(f'{name}: a comment needs a line of its own, {comment!r} is left out')


class Config:
    """The options as attributes (- becomes _)."""

    def __init__(self, arguments):
        self.settings, self.files = [], []              # all lines in order; (file, section) of all that was read
        self.variables, self.setters = set(), {}        # names in a %(...); option's name -> what set it
        self.directory = os.getcwd()
        vars(self).update((option.attribute, option.default) for option in ROWS)
        self.take((name[6:].lower().replace('_', '-'), value, f'environment {name}')
                  for name, value in os.environ.items() if name.startswith('UWSGI_'))
        self.take(command_line(arguments))
        for setting in self.settings:                   # it may grow
            if setting.name == 'inherit':
                self.take(self.read_ini(setting))
        for setting in sorted(self.settings, key=lambda setting: setting.where == COMMAND_LINE):    # it wins
            self.judge(setting)
            self.use(setting)
        self.compare()
        self.warnings = list(dict.fromkeys(f'{s.where}: {text}' for s in self.settings for text in s.warnings))
        self.errors = list(dict.fromkeys(f'{s.where}: {text}' for s in self.settings for text in s.errors))
        if self.strict:
            self.errors += [f'{s.where}: {s.warnings[-1]} (strict)' for s in self.settings if s.fate == 'unknown']
        if self.processes * self.threads > 10000:
            self.errors.append(f'processes = {self.processes}, threads = {self.threads}: 10000 in all are the most')
        self.logto = self.absolute(self.logto, 'daemonize', 'logto', 'logger')
        self.pidfile = self.absolute(self.pidfile, 'pidfile')
        self.req_logger = [self.absolute(path, 'req-logger') for path in self.req_logger]

    def compare(self):
        """What options make of each other."""
        self.logto = self.daemonize or self.logto or (self.logger[-1] if self.logger else None)
        for setting in self.settings if self.logto else ():
            name = setting.name in BY_NAME and BY_NAME[setting.name].name
            names_log = name in ('daemonize', 'logto', 'logger') or name == 'req-logger' and setting.value == 'stdio'
            if names_log and self.logto not in setting.value and not setting.reason:
                setting.warnings.append(f'{setting.name} does nothing: there is one log, and that is {self.logto}')
        if self.module and self.wsgi_file:
            self.setters['wsgi-file'].warnings.append('wsgi-file is for the case that module is not there')
        if self.cheaper >= self.processes:
            self.setters['cheaper'].warnings.append(
                f'cheaper does nothing: {self.cheaper} has to be lower than processes = {self.processes}')

    def absolute(self, path, *options):
        """The path of a log or pidfile, as one of these options has it. uWSGI opens them before chdir, but for some."""
        name = next((self.setters[one].name for one in options if one in self.setters), '')
        late = name in ('logger', 'req-logger', 'logger-req', 'daemonize2', 'pidfile2', 'safe-pidfile', 'safe-pidfile2')
        return path and os.path.abspath(os.path.join(late and self.chdir or '', path))

    def where(self, value, *names):
        """'site.ini:3: ', for messages: where a value (by now an absolute path) stands, as that of these options."""
        directories = self.directory, os.path.join(self.directory, self.chdir or '')
        return next((f'{s.where}: ' for s in self.settings
                     if value in (s.value, *(os.path.join(one, s.value.removeprefix('file:')) for one in directories))
                     and s.name in BY_NAME and (not names or BY_NAME[s.name].name in names)), '')

    @contextlib.contextmanager
    def errors_at(self, value, *names):
        """An error within says where this value stands, as where() has it."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f'{self.where(value, *names)}{error}') from None

    def take(self, lines):
        """Take lines (name, value, where); those that a line brings come next."""
        lines = collections.deque(lines)
        while lines:
            setting = Setting(*lines.popleft())
            self.settings.append(setting)
            option, brought = BY_NAME.get(setting.name), []
            if setting.name in BLOCKS:
                brought = self.block(setting, lines)
            elif option is BY_NAME['ini']:
                brought = self.read_ini(setting)
            elif option is BY_NAME['set']:
                key, _, value = map(str.strip, setting.value.partition('='))
                brought = [(key, value, setting.where)]
                self.variables.update([key] if setting.name != 'set' else [])
            lines.extendleft(reversed(brought))

    def block(self, setting, lines):
        """The lines up to the end of an if or for, once for each text that %(_) stands for."""
        body, file = [], setting.where.rpartition(':')[0]
        for name, _, where in tuple(lines):
            place, _, line = where.rpartition(':')
            if name in ENDS or place != file:
                break
            body.append(lines.popleft())
            if name in BLOCKS:
                setting.errors.append(f'{name} in line {line} within another block: there are no nested blocks')
            elif name == 'else':
                setting.errors.append(f'there is no else (line {line}): write a second block, with if-not-')
        if not lines or lines[0][0] not in ENDS:
            setting.warnings.append('a block has no end; it ends with the file')
        texts = self.texts_of_block(setting)
        setting.reason = '' if texts else 'the lines of the block are left out'
        return [(name, value.replace('%(_)', text), where) for text in texts for name, value, where in body]

    def texts_of_block(self, setting):
        """What %(_) stands for in a block: several texts in a loop, one or none in an if."""
        value = self.fill(setting.value)
        if setting.name in LOOPS:
            return LOOPS[setting.name](value)
        subject, equals, wanted = map(str.strip, value.partition('='))
        found = (BLOCKS[setting.name] or self.first)(subject)           # True or False, or a text or None
        holds = found not in (None, False) and (not equals or found == wanted)
        if setting.name.startswith('if-not-'):
            return [] if holds else ['%(_)']            # it stays as it is
        return [subject if found is True else found] if holds else []

    def read_ini(self, setting):
        """The lines of the section [uwsgi] of a file, or of another: file:section, :section (of the last file)."""
        file, section = self.fill(setting.value), 'uwsgi'
        if not os.path.exists(file) and ':' in file and '://' not in file:
            file, _, section = file.partition(':')
            file = file or (self.files[-1][0] if self.files else '')
        if (file, section) in self.files:
            setting.warnings.append(f'{file}:{section} was read already')
            return []
        try:
            text = read_file(file)
        except (OSError, ValueError) as error:
            why = f"can't read {file}: {getattr(error, 'strerror', None) or error}"
            if setting.where == COMMAND_LINE and RELOADED not in os.environ:
                raise ConfigError(why) from None
            setting.errors.append(why + '; only files can be read' * ('://' in file))
            return []
        self.files.append((file, section))
        text = magic(text, self.files[0], self.files[-1])
        for rest in text.split('%(')[1:]:
            self.variables.update(rest.partition('\n')[0].replace('(', ' ').replace(')', ' ').split())
        sections = sections_of(file, text)
        stray = sections.pop(None)
        if section not in sections:
            others = ', '.join(f'{file}:{name}' for name in sections)
            others = f'try {others}' if others else f'put a line [{section}] in front of its options'
            setting.warnings.append(f'{file}: there is no section [{section}], {others}')
        elif stray:
            name, _, where = stray[0]
            setting.warnings.append(f'{where}: {name!r} and what follows stand in front of the first section, and do '
                                    'nothing')
        return sections.get(section, [])

    def first(self, name):
        """The value of the first line with this name, for %(name)."""
        self.variables.add(name)
        return next((setting.value for setting in self.settings if setting.name == name), None)

    def fill(self, value, within=()):
        """Fill in $(ENV), @(file) and %(name), in uWSGI's order; what isn't known stays as it is."""
        value = substitute('$(', value, os.environ.get)
        value = substitute('@(', value, read_if_there)
        return substitute('%(', value, lambda expression: self.compute(expression, within))

    def compute(self, expression, within):
        """The text for %(name); %(a b) joins, %(a + b) computes, strictly from left to right. What is unknown is
        skipped; None if all is."""
        expression = substitute('(', expression, lambda inner: self.compute(inner, within))
        result = operator = None
        steps = {'++': '+ 1', '--': '- 1'}              # as words of their own: a name may hold them too
        for token in ' '.join(steps.get(word, word) for word in expression.split()).split():
            text = token if token.isdecimal() else None if token in within else self.first(token)
            if token in ('+', '-', '*', '/'):
                operator = token
            elif text is not None:
                text = self.fill(text, (*within, token))
                a, b = leading_number(result or '') or 0, leading_number(text) or 0
                if operator and result is not None:
                    result = str({'+': a + b, '-': a - b, '*': a * b, '/': int(a / (b or math.inf))}[operator])
                    operator = None
                else:
                    result = (result or '') + text
        return result

    def judge(self, setting):
        """The final fate of a line, now that all names in %(...) are known."""
        dashed = setting.name.replace('_', '-')
        guessed = setting.fate == 'unknown' or setting.fate == 'unsupported' and setting.name not in PATTERNS   # by a *
        if guessed and (setting.name in self.variables or setting.where.startswith('environment')):
            setting.fate, setting.reason = 'variable', ''
        elif setting.fate == 'unknown' and fate(dashed)[0] != 'unknown':
            setting.warnings.append(f"'{setting.name}' is written '{dashed}'")
            setting.name, (setting.fate, setting.reason) = dashed, fate(dashed, setting.value)
        if setting.fate in ('unknown', 'unsupported'):
            setting.warnings.append(describe(setting.name, setting.value))
            setting.reason = ''

    def use(self, setting):
        """Fill in the value and set the attribute."""
        name, option = setting.name, BY_NAME.get(setting.name)
        value = setting.value = self.fill(setting.value, (name,))
        if not option:
            return
        result, doubts, shown = None, [], '***' if name == 'env' else value
        try:
            result = option.read(value, doubts)
        except (TypeError, ValueError):
            setting.errors.append(f"'{name} = {shown}': {option.expected} is expected")
        setting.warnings += [f'{name} = {shown}: {doubt}' for doubt in doubts]
        if '@(' in value:
            setting.errors.append(f'{name} = {value}: there is no such file to read, and nothing is run; '
                                  'set a variable before the start and use $(VARIABLE)')
        if result is None:
            return
        if option.many:
            result = (*getattr(self, option.attribute), result)
        elif option.name in self.setters:
            self.setters[option.name].reason = f'{setting.where} overrides it'
        self.setters[option.name] = setting
        setattr(self, option.attribute, result)


def show_config(config):
    """Print each line of the configuration: its fate, name = value, where it stands, a remark. No secrets."""
    pairs = [pair for s in config.settings for pair in ((s.name, s.value), s.value.partition('=')[::2])]
    secrets = [value.strip() for name, value in pairs + list(os.environ.items()) if is_secret(name) and len(value) > 5]
    sys.stdout.reconfigure(errors='backslashreplace')
    for setting in config.settings:
        value, (name, equals, _) = setting.value, setting.value.partition('=')
        if is_secret(setting.name) or setting.name == 'env' or equals and is_secret(name):
            value = '***' if is_secret(setting.name) or not equals else f'{name}=***'
        remark = '; '.join(filter(None, [*setting.warnings, *setting.errors, setting.reason]))
        line = f'{setting.fate:12}{setting.name} = {value}  ({setting.where})  {remark}'.rstrip()
        for secret in secrets:
            line = line.replace(secret, '***')
        print(line.replace('\n', '\\n'))
    sys.stdout.flush()


def usage():
    lines = [__doc__.split('\n\n')[0], 'minuwsgi.py [FILE.ini[:SECTION] | FILE.py | MODULE:CALLABLE] [OPTION …]',
             'minuwsgi.py --stop PIDFILE | --reload PIDFILE | --curl SOCKET [PATH] | --version | --help']
    for group, options in itertools.groupby(ROWS, lambda option: option.group):
        lines.append(f'{group}:')
        for option in options:
            names = ', '.join([f'--{option.name}', *(name for name in option.names if name[0] == '-')])
            names += ' V' * (option.kind != 'flag')
            lines.append(f'  {names:26} {option.meaning}' + (f' [{option.default}]' if option.default else ''))
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------------------
# 2. Waiting, and the log
#
# No client is waited for without a bound: it is poll(2) with a time, or RWF_NOWAIT, which saves even that.
#
# Everything that is logged goes to descriptor 2, which `logto` puts on a file. One line is one os.write(), so that the
# lines of many processes don't mix. A log that can't be written (disk full, pipe closed, or full because nobody reads
# it) is no reason to stop serving: lines are lost then, and counted. It isn't set to O_NONBLOCK, which would hold for
# other programs that share the descriptor too.

def ready_within(fd, event, seconds):
    """Does an event come to a descriptor within so many seconds? Errors are events always, and so is the end of a
    connection, once both sides have ended it."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(seconds * 1000))


def nowait_flag():
    """RWF_NOWAIT where preadv() takes it for sockets (Linux 6.5, see preadv2(2)), else 0. With it, reading from a
    blocking socket fails instead of waiting: no call is needed to make each connection non-blocking (-0.4 us)."""
    a, b = socket.socketpair()
    with a, b, contextlib.suppress(OSError, AttributeError):
        b.send(b'.')
        os.preadv(a.fileno(), [bytearray(1)], -1, os.RWF_NOWAIT)
        return os.RWF_NOWAIT
    return 0


NOWAIT = nowait_flag()


def write_now(fd, line):
    """os.write() that doesn't wait. Terminals and old kernels can only be asked before, which is nearly as good: two
    processes may take the same room for theirs."""
    try:
        return os.pwritev(fd, (line,), -1, os.RWF_NOWAIT)
    except BlockingIOError:
        raise
    except (OSError, AttributeError):
        if not ready_within(fd, select.POLLOUT, 0):
            raise BlockingIOError from None
        return os.write(fd, line[:select.PIPE_BUF])


def open_safely(name, flags, mode):
    """A descriptor of a file, which is made if it isn't there. A link is followed if root or we have made it
    (/dev/stdout is one): others could lead us to any file."""
    link = os.path.islink(name)
    if link and (maker := os.lstat(name).st_uid) not in (0, os.geteuid()):
        raise OSError(errno.ELOOP, f'it is a link, made by the user {maker}; name the file itself')
    return os.open(name, flags | os.O_CREAT | (0 if link else os.O_NOFOLLOW), mode)


def open_to_append(name):
    """A descriptor that writes to the end of a log."""
    try:
        return open_safely(name, os.O_WRONLY | os.O_APPEND, 0o640)
    except OSError as error:
        raise ConfigError(f"can't write the log {name}: {error.strerror}") from None


class Log(io.FileIO):
    """A descriptor for lines, which holds nobody for longer than a second in ten. Lies under sys.stdout and
    sys.stderr too: an application that prints should neither wait for the log nor fail with it."""

    __slots__ = 'fd', 'path', 'looked', 'lost', 'put', 'behind'         # -0.1 us for each line
    opened, date = [], ''               # of all Logs: a list of them; log-date as a format of strftime(), or ''
    impatient_until = 0.0               # of all too: when one is stuck, none waits until then

    def __init__(self, fd, path=None):
        super().__init__(fd, 'w', closefd=False)
        self.fd, self.path, self.looked, self.lost = fd, path, 0.0, 0
        self.look()
        Log.opened.append(self)

    def look(self):
        """What is behind the descriptor now? Only a file never makes us wait."""
        self.put = os.write if os.path.isfile(self.fd) else write_now
        self.behind = os.fstat(self.fd)

    def open_file(self, path):
        """Write to the end of this file from now on."""
        new = open_to_append(path)
        os.dup2(new, self.fd, inheritable=self.fd < 3)
        os.close(new)
        self.path = path
        self.look()

    def follow(self):
        """Go on in the file that has the log's name now, after somebody (logrotate) moved the old one."""
        self.looked = time.monotonic()
        try:
            if self.path and os.path.samestat(os.fstat(self.fd), self.behind) \
                    and not (os.path.exists(self.path) and os.path.samefile(self.path, self.fd)):
                self.open_file(self.path)
        except (ConfigError, OSError) as error:         # the old file goes on
            self.looked += 60                           # no such line each second
            self.write(f'log: {error}\n'.encode('utf-8', 'backslashreplace'))

    def write(self, line):
        if self.path and time.monotonic() > self.looked + 0.5:
            self.follow()
        size = len(line)
        if self.lost:
            line = b'\nlog: %d lines were lost here: it could not be written\n' % self.lost + line
        try:
            while line:
                try:
                    line = line[self.put(self.fd, line):]
                except BlockingIOError:
                    if time.monotonic() < Log.impatient_until or not ready_within(self.fd, select.POLLOUT, 1):
                        Log.impatient_until = time.monotonic() + 10
                        raise
            self.lost = 0
        except OSError:
            self.lost += 1
        return size


while (spare := os.open(os.devnull, os.O_RDWR)) < 3:    # if they were closed at the start, a socket would be 2
    pass
os.close(spare)
main_log = Log(2)


def log(message):
    date = time.strftime(Log.date) + ' - ' if Log.date else ''
    main_log.write(f'{date}{message}\n'.encode('utf-8', 'backslashreplace'))


held_back = {}                          # cause -> (until when, how many)


def log_now_and_then(cause, message):
    """Log what anybody on the network can bring about: a line a second for each cause."""
    until, more = held_back.get(cause, (0.0, 0))
    now = time.monotonic()
    if now >= until:
        log(f'{message} (and {more} more like it)' if more else message)
        until, more = now + 1, -1
    held_back[cause] = until, more + 1


def log_exception(message):
    """Log a message and the traceback of the exception that is being handled."""
    error = sys.exc_info()[1]
    try:
        import traceback
        text = traceback.format_exc().rstrip()
    except Exception:                                   # no memory, or no descriptor to read it with
        text = repr(error)
    log(f'{message}\n{text}')


def flush_streams():
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError, ValueError, AttributeError):          # an application may have closed them
            stream.flush()


def mtime(name):
    with contextlib.suppress(OSError):
        return os.stat(name).st_mtime_ns


def follow_logs(*_):
    """Now, not only before the next line: the old file can be compressed."""
    for one in Log.opened:
        one.follow()


def rotate_log(config):
    """log-maxsize: move the log away when it is too large. Was it?"""
    if config.logto and os.fstat(2).st_size > config.log_maxsize:
        try:
            name = config.log_backupname or f'{config.logto}.{int(time.time())}'
            if config.log_backupname or not os.path.lexists(name):      # else a second later
                os.rename(config.logto, name)
                return True
        except OSError as error:
            config.log_maxsize = 0
            log(f"log-maxsize: can't rename {config.logto}: {error.strerror}")


class RequestLog:
    """A line for each request of a core, in uWSGI's format, byte for byte, or in that of log-format."""

    def __init__(self, config, file, total, worker, core):
        self.config, self.file = config, file           # a Log
        self.total = total                              # of all workers, in shared memory
        self.worker, self.core = worker, core           # their numbers
        self.all, self.format = not config.disable_logging, config.log_format
        self.forwarded = config.log_x_forwarded_for
        self.next_second, self.date = 0.0, ''
        self.start, self.end = f'[pid: {os.getpid()}|app: 0|req: ', f'(1 switches on core {core})\n'

    def add(self, environ, response, requests, variables, size, ended, took):
        """requests: of this core so far; variables, size: number and bytes of those in the packet; ended: a
        time.monotonic(); took: seconds."""
        if ended >= self.next_second:                   # the date is that of all lines of a second
            date = time.time()
            self.next_second, self.date = ended + 1 - date % 1, time.ctime(date)        # strftime() heeds the locale
        self.total[0] = total = self.total[0] + 1
        get, status, sent, head, headers = environ.get, (response.status or '500')[:3], 0, 0, 0
        if response.sent:
            sent, head, headers = response.size, len(response.head), response.headers
        if not self.all:                                # with disable-logging, some requests are logged all the same
            config = self.config
            if not (config.log_4xx and status[0] == '4' or config.log_5xx and status[0] == '5'
                    or config.log_slow and took * 1000 >= config.log_slow or config.log_zero and not sent
                    or config.log_big and sent >= config.log_big):
                return
        address = self.forwarded and get('HTTP_X_FORWARDED_FOR') or get('REMOTE_ADDR', '')
        if self.format:
            line = self.formatted(environ, took, {
                'wreq': requests, 'addr': address, 'status': status, 'headers': headers, 'hsize': head, 'rsize': sent,
                'size': head + sent, 'vars': 2 * variables, 'pktsize': size})
        else:
            line = (f"{self.start}{requests}/{total}] {address} ({get('REMOTE_USER', '')}) "
                    f"{{{2 * variables} vars in {size} bytes}} [{self.date}] {get('REQUEST_METHOD', '')} "
                    f"{get('REQUEST_URI', '')} => generated {sent} bytes in {math.floor(took * 1000)} msecs "
                    f"({get('SERVER_PROTOCOL', '')} {status}) {headers} headers in {head} bytes {self.end}")
        self.file.write(line.encode('latin-1', 'backslashreplace'))

    def formatted(self, environ, took, values):
        """The line of log-format: %(name) of uWSGI's names, %(var.NAME) of the environ; '-' for what isn't there."""
        now, get = time.time(), environ.get
        local = time.strftime('%d/%b/%Y:%H:%M:%S %z', time.localtime(now))
        values.update({
            'uri': get('REQUEST_URI'), 'method': get('REQUEST_METHOD'), 'user': get('REMOTE_USER'),
            'host': get('HTTP_HOST'), 'proto': get('SERVER_PROTOCOL'), 'uagent': get('HTTP_USER_AGENT'),
            'referer': get('HTTP_REFERER'), 'cl': get('CONTENT_LENGTH') or 0,
            'micros': int(took * 1e6), 'msecs': int(took * 1e3), 'secs': f'{took:.6f}',
            'tmsecs': int((now - took) * 1e3), 'tmicros': int((now - took) * 1e6), 'time': int(now - took),
            'epoch': int(now), 'ctime': self.date, 'ltime': local, 'ftime': local, 'pid': os.getpid(),
            'wid': self.worker, 'core': self.core, 'req': self.total[0], 'switches': 1,
            **dict.fromkeys(('modifier1', 'modifier2', 'rss', 'rssM', 'vsz', 'vszM', 'werr', 'rerr', 'ioerr'), 0)})

        def fill(name):
            value = get(name[4:]) if name[:4] == 'var.' else values.get(name)
            return '-' if value in (None, '') else str(value).replace('\n', '\\n')
        return substitute('%(', self.format, fill) + '\n'


# ---------------------------------------------------------------------------------------------
# 3. Sockets
#
# The master binds, the workers accept: all of them inherit the same listening socket, and the kernel gives each
# connection to one of them. A unix socket has its mode from the first moment (umask round bind), and its file is
# removed only while it is still ours (device and inode), as another server may have taken the name over.

LISTEN_MAX = int(read_if_there('/proc/sys/net/core/somaxconn') or 1 << 30)     # the kernel cuts silently: listen(2)


@contextlib.contextmanager
def borrowed(fd):
    """A socket.socket for the descriptor of somebody else, which is left as it is: open, and blocking if it blocks
    (with a default timeout, socket.socket() would change that). Not beside threads that make sockets."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    try:
        one = socket.socket(fileno=fd)
    finally:
        socket.setdefaulttimeout(timeout)
    try:
        yield one
    finally:
        one.detach()


def inode_of(status):
    return status.st_dev, status.st_ino


def vacuum(one):
    """Remove the file of a Listener or Pidfile, if it is still the one that was made here."""
    try:
        if one.inode and one.inode == inode_of(os.stat(one.name)):
            os.unlink(one.name)
    except FileNotFoundError:
        pass
    except OSError as error:                            # it was made by root, and we aren't any more
        log(f"vacuum: {one.name} can't be removed: {error.strerror}")


def vacuum_all(config, owned):
    """At the end of the server, if `vacuum` asks for it."""
    for one in owned if config.vacuum else ():
        vacuum(one)


def id_of(kind, name, where):
    """The number of a user or group, by name or number; -1, which leaves it as it is, if there is no name."""
    import grp
    import pwd
    look_up = pwd.getpwnam if kind == 'user' else grp.getgrnam
    with contextlib.suppress(KeyError):
        found = -1 if not name else int(name) if name.isdecimal() else look_up(name)[2]
        if found < 0xffffffff:
            return found
    raise ConfigError(f'{where}there is no {kind} {name!r}')


def user_and_group(config):
    """(uid, gid) of the options with these names."""
    return (id_of('user', config.uid, config.where(config.uid, 'uid')),
            id_of('group', config.gid, config.where(config.gid, 'gid')))


def socket_owner(config):
    """(uid, gid) for the files of sockets."""
    if not config.chown_socket:
        return (-1, -1) if os.getuid() else user_and_group(config)      # not root: they are ours already
    where, (user, _, group) = config.where(config.chown_socket, 'chown-socket'), config.chown_socket.partition(':')
    return id_of('user', user, where), id_of('group', group, where)


def parse_address(address):
    """The address of an option -> ('unix', path or '\\0name'), ('tcp', (host, port)) or ('fd', number). Refuses what
    can't be right, before bind() does in fewer words."""
    name = address.removeprefix('unix://').removeprefix('unix:')
    scheme, slashes, number = name.partition('://')
    host, colon, port = name.rpartition(':')
    path = os.path.abspath(name)
    if name[:1] == '@':
        return 'unix', '\0' + name[1:]
    if scheme == 'fd' and number.isdecimal():
        return 'fd', int(number)
    if slashes:
        why = 'write host:port, a path, or fd://3 for a descriptor'
    elif name[:1] == '=':
        why = 'a number of a shared-socket; write its address here'
    elif ',' in host:
        why = 'one address for each line'
    elif colon and port.isdecimal() and int(port) < 65536:
        return 'tcp', (host.strip('[]'), int(port))
    elif colon:
        why = f'{port!r} is no port (0 to 65535); write host:port or :port'
    elif not os.path.isdir(os.path.dirname(path)):
        why = f'there is no directory {os.path.dirname(path)}'
    elif len(os.fsencode(path)) > 107:
        why = 'path too long: 107 bytes are the most'
    elif os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        why = "there is a file of that name that isn't a socket"
    else:
        return 'unix', path
    raise ConfigError(f"can't bind {address}: {why}")


def remove_stale_socket(path):
    """Make way for bind(): remove a socket that nobody listens on, or tell who does, see unix(7)."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            return os.unlink(path)                      # it is a socket: parse_address() refuses other files
        except BlockingIOError:                         # too many wait there
            pass
        pid = command = '?'
        with contextlib.suppress(OSError, AttributeError):      # no /proc, not Linux, not connected
            pid = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder) or pid
            with open(f'/proc/{pid}/cmdline', errors='replace') as file:
                command = file.read(200).replace('\0', ' ').strip()
        raise FileExistsError(f'another server listens there, pid {pid} ({command}); stop it, or choose another name')


def name_of(where):
    """An address of the kernel as an option has it: a path, @name, host:port or [v6]:port."""
    if type(where) is tuple:
        return f'[{where[0]}]:{where[1]}' if ':' in where[0] else f'{where[0]}:{where[1]}'
    return os.fsdecode(where).replace('\0', '@')


def resolve(host, port):
    """The first of getaddrinfo(3)'s answers."""
    return socket.getaddrinfo(host or '0.0.0.0', port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]


# What to do when bind(2) fails.
HINTS = {errno.EADDRINUSE: '; ss -ltnp tells by whom',
         errno.EACCES: '; this user may not write there, or take over what another user has left (remove it then); '
                       'ports below 1024 are for root, see uid'}


class Listener:
    """A listening socket. protocol: 'uwsgi', 'http', 'stats'.  inode, fd: of one that is inherited, and not bound."""

    def __init__(self, config, address, protocol, inode, fd):
        self.address, self.protocol, self.inode = address, protocol, inode and tuple(inode)
        kind, where = parse_address(address) if fd is None else ('fd', fd)
        try:
            if kind == 'fd':
                self.socket = socket.socket(fileno=where)
                os.set_inheritable(where, False)
            elif kind == 'unix':
                self.bind_unix(where, config)
            else:
                self.bind_tcp(*where)
            self.backlog = min(config.listen, LISTEN_MAX)
            self.socket.listen(self.backlog)
        except (OSError, ValueError) as error:
            hint = HINTS.get(getattr(error, 'errno', 0), '')
            raise ConfigError(f"can't bind {address}: {getattr(error, 'strerror', None) or error}{hint}") from None
        where = self.socket.getsockname()               # the kernel's name, for the log and the environ
        self.name, self.host, self.port = name_of(where), 'localhost', '80'
        if type(where) is tuple:
            self.host, self.port = self.name.rsplit(':', 1)
            if protocol == 'uwsgi' and not f'{where[0]}.'.startswith(('127.', '::1.')):
                log(f'warning: {self.name} believes whoever reaches it, as the uwsgi protocol has it (REMOTE_ADDR, '
                    'REMOTE_USER …): let a firewall admit the web server alone, or bind 127.0.0.1 or a path')

    def bind_unix(self, path, config):
        self.socket = socket.socket(socket.AF_UNIX)
        if path[0] == '\0':
            self.socket.bind(path)
            return
        remove_stale_socket(path)
        mode = 0o660 if config.chmod_socket is None else config.chmod_socket
        before = os.umask(0o777 & ~mode)
        try:
            self.socket.bind(path)
        finally:
            os.umask(before)
        self.inode = inode_of(os.lstat(path))
        try:
            if config.socket_owner != (-1, -1):
                os.lchown(path, *config.socket_owner)   # of a link itself, if somebody put one there
        except OSError:
            os.unlink(path)
            raise ConfigError(f"{path} can't be given to {config.chown_socket or config.uid}: only root may, and for a "
                              'group its members') from None

    def bind_tcp(self, host, port):
        family, kind, _, _, where = resolve(host, port)
        self.socket = socket.socket(family, kind)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # what it accepts inherits this
        if self.protocol == 'uwsgi' and hasattr(socket, 'TCP_DEFER_ACCEPT'):    # not before its bytes are there
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 4)
        self.socket.bind(where)

    def queue(self):
        """(connections that wait, how many may), see tcp(7) on TCP_INFO, sock_diag(7); zeros where nobody knows."""
        try:
            if self.socket.family != socket.AF_UNIX:
                info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
                return struct.unpack_from('=II', info, 24)      # tcpi_unacked, tcpi_sacked
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:   # NETLINK_SOCK_DIAG
                inode = os.fstat(self.socket.fileno()).st_ino
                netlink.setblocking(False)
                netlink.send(struct.pack('=IHHIIBBHIIIII', 40, 20, 1, 0, 0, socket.AF_UNIX, 0, 0, 1 << 10, inode,
                                         0x10, 0xffffffff, 0xffffffff))             # UDIAG_SHOW_RQLEN
                answer = netlink.recv(4096)
            size, kind = struct.unpack_from('=HH', answer, 32)  # behind nlmsghdr and unix_diag_msg
            return struct.unpack_from('=II', answer, 36) if kind == 4 else (0, 0)   # UNIX_DIAG_RQLEN
        except (OSError, AttributeError, struct.error):
            return 0, 0

    def waiting(self):
        """How many connections wait at the most."""
        waiting, most = self.queue()
        return waiting if most else self.backlog


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
WSGI, CGI, WSGI_STRIP = 0, 9, 30        # 30: PATH_INFO begins with SCRIPT_NAME, which is taken off


class BadRequest(Exception):
    """A request that can't be understood: the status for the client, and why, for both."""

    def __init__(self, why, status='400 Bad Request'):
        super().__init__(why)
        self.status = status


class ClientGone(OSError):
    """The client closed its connection, was too slow, or has got all that it wanted."""


def pack_request(variables):
    """{name: value} (str, latin-1) -> the packet (bytes) without a body."""
    block = b''.join(len(raw).to_bytes(2, 'little') + raw
                     for item in variables.items() for raw in map(str.encode, item, ('latin-1', 'latin-1')))
    return bytes((WSGI,)) + len(block).to_bytes(2, 'little') + b'\0' + block


def unpack_vars(block):
    """The block of a packet (bytes) -> [(name, value), ...]: the protocol in short. Expected is faster, checks more."""
    text, at, found = block.decode('latin-1'), 0, []
    while at < len(block):
        begin = at + 2
        at = begin + int.from_bytes(block[at:begin], 'little')
        found.append(text[begin:at])
    names, values = found[::2], found[1::2]
    if at != len(block) or len(names) != len(values):
        raise BadRequest('the lengths in the block of variables do not add up')
    if '' in names:
        raise BadRequest('a variable without a name')
    return list(zip(names, values))


# What a web server sends the same with each request, if nothing else is set up; most sites have one name.
CONSTANT = frozenset(('DOCUMENT_ROOT', 'SERVER_PROTOCOL', 'REQUEST_SCHEME', 'SERVER_PORT', 'SERVER_NAME', 'HTTPS',
                      'SCRIPT_NAME', 'SERVER_SOFTWARE', 'GATEWAY_INTERFACE', 'UWSGI_SCHEME', 'HTTP_HOST'))
UNWANTED = frozenset(('HTTP_CONTENT_LENGTH', 'HTTP_CONTENT_TYPE'))      # PEP 3333: they have no HTTP_


def set_scheme(environ):
    """wsgi.url_scheme from what the web server says of its client's connection."""
    https = environ.get('HTTPS', '').lower() in ('on', '1', 'true', 'https')
    environ['wsgi.url_scheme'] = environ.get('UWSGI_SCHEME') or (
        'https' if https else environ.get('REQUEST_SCHEME') or 'http')


def remember(known, key, value):
    """known[key] = value, and value. To ask known.get() first takes 0.05 us less than a call through lru_cache."""
    if len(known) >= 1000:              # clients can invent headers
        known.clear()
    known[key] = value
    return value


# What variable_name(), parse_line(), status_line() and header_start() have returned.
VARIABLE_NAMES, HEADER_LINES, STATUS_LINES, HEADER_STARTS = {}, {}, {}, {}


def variable_name(raw):
    """raw: the high byte of the name's size, then the name. That byte must be 0: nobody looks at it elsewhere."""
    if not raw:
        raise BadRequest('the lengths in the block of variables do not add up')
    if raw[0] != '\0':
        raise BadRequest('a name of more than 255 bytes')
    if raw == '\0':
        raise BadRequest('a variable without a name')
    return remember(VARIABLE_NAMES, raw, sys.intern(raw[1:]))


class Expected:
    """What the next packet looks like, guessed from an earlier one: -4 us of 14 for each request. Core.serve()
    compares packets with `plan`; here it is made (learn_order), and what doesn't fit it is read (rest).

    A web server sends its variables in the same order each time. So a plan has, for each variable that changes, a
    piece (raw, size, name): raw is the text in front of its value, to be compared at once instead of reading a length
    and looking up a name. A variable that stays the same (a constant) is a part of the next raw, with its value, which
    environ has from the plan's template. What comes before the REQUEST_URI of a GET without a query is one text,
    `start`. Nothing is believed unseen: from the first piece that isn't there, rest() reads the block without a guess.

    After REQUEST_METHOD=GET, SERVER_NAME=a, REQUEST_URI=/x the pieces are '\\16\\0REQUEST_METHOD' and
    '\\13\\0SERVER_NAME\\1\\0a\\13\\0REQUEST_URI'. If the second isn't there, SERVER_NAME may be another, or none:
    `missed` says which constants rest() has to take out of environ again."""

    def __init__(self, base):
        self.base = base                                # the environ without the web server's variables
        # start (or None), start_end, started_environ (gives the environ up to there), started_pieces (those after it);
        # for other packets new_environ, all_pieces; how many variables. ('nothing' is never found: its size is 0.)
        self.plan = None, 4, base.copy, (), base.copy, (('nothing', 0, ''),), 0
        self.constants = []     # names of those in the template, in their order
        self.missed = {}        # raw -> (text of its constants; constants before it, and with it; variables before it)
        self.countdown = 0

    def rest(self, environ, memory, text, at, raw):
        """Read the variables from at on; raw is the piece that wasn't there ('': all were). Their number."""
        constants, known, with_them, number = self.missed.get(raw, ('', len(self.constants), 0, self.plan[-1]))
        if constants and text.startswith(constants, at):        # as mostly: they are there, and another header follows
            at, number, known = at + len(constants), number + with_them - known, with_them
        for name in self.constants[known:]:
            environ.pop(name, None)
            if name in self.base:                       # SCRIPT_NAME is always there
                environ[name] = self.base[name]
        end = len(text)
        while at < end:
            middle = at + 2 + memory[at]
            value = middle + 2
            after = value + memory[middle]
            if memory[middle + 1]:
                after += memory[middle + 1] << 8
            raw = text[at + 1:middle]
            name = VARIABLE_NAMES.get(raw) or variable_name(raw)
            if name in environ and name[:5] == 'HTTP_':
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
            self.countdown = 10
            self.learn_order(memory, text)
        return number

    def learn_order(self, memory, text):
        """Make the plan from a block that was found to be right, if it is a good example."""
        pairs = [(sys.intern(name), value) for name, value in unpack_vars(memory[4:len(text)])]
        names = [name for name, _ in pairs]
        last = max((i for i, name in enumerate(names) if name not in CONSTANT), default=-1)
        if len(set(names)) < len(names) or not UNWANTED.isdisjoint(names) or 'HTTP_TRANSFER_ENCODING' in names \
                or not {'HTTPS', 'REQUEST_SCHEME', 'UWSGI_SCHEME'}.isdisjoint(names[last + 1:]):
            return                                      # the last: the template must know what makes wsgi.url_scheme
        pieces, template, begin, end, known = [], dict(self.base), 4, 4, 0
        self.constants, self.missed = [], {}
        for i, (name, value) in enumerate(pairs):
            middle = end + 2 + len(name)
            end = middle + 2 + len(value)
            if name in CONSTANT and i < last:
                template[name] = value
                self.constants.append(name)
            else:
                raw = text[begin:middle]
                self.missed[raw] = raw[:-2 - len(name)], known, len(self.constants), known + len(pieces)
                pieces.append((raw, len(raw), name))
                begin, known = end, len(self.constants)
        set_scheme(template)
        start, start_end, started, started_pieces = None, 4, template, ()       # no text is equal to None
        before = dict(pairs[:names.index('REQUEST_URI')]) if 'REQUEST_URI' in names else {}
        if before.get('REQUEST_METHOD') == 'GET' and before.get('QUERY_STRING') == before.get('CONTENT_LENGTH') == '':
            start_end = len(pack_request(before)) + 2 + len('REQUEST_URI')
            start, started = text[4:start_end], {**template, **before}
            behind = [name for _, _, name in pieces].index('REQUEST_URI') + 1
            started_pieces = ('', 0, 'REQUEST_URI'), *pieces[behind:]
        self.plan = start, start_end, started.copy, started_pieces, template.copy, tuple(pieces), len(pairs)
        self.countdown = 200


# ---------------------------------------------------------------------------------------------
# 5. HTTP/1.1
#
# RFC 9112, as far as a server behind a load balancer or for a browser needs it. A head becomes the same environ as a
# packet. What could be read in two ways (and so smuggle a request past a proxy) is refused: lengths given twice, bare
# line ends, blanks before a colon.

HEAD_MAX, LINE_MAX, FIELDS_MAX = 65536, 16384, 200      # bytes of a head, of its first line; lines after that
TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
HOST = frozenset("-._~%!$&'()*+,;=:[]0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
NO_FIRST_LINE = 'the first line is not METHOD TARGET HTTP/1.1'
CONTROL = bytes((*range(9), *range(10, 32), 127))       # all but the tab
SINGLE = frozenset(('CONTENT_LENGTH', 'CONTENT_TYPE', 'HTTP_HOST', 'HTTP_TRANSFER_ENCODING'))


def controls(raw):
    """How many control characters are in there? A tab is none."""
    return len(raw) - len(raw.translate(None, CONTROL))


@functools.lru_cache(1000)
def header_key(name):
    """'User-Agent' -> 'HTTP_USER_AGENT'; '' where the header must not reach the application."""
    if not 0 < len(name) < 256 or not TOKEN.issuperset(name):          # a long one would fill the cache
        raise BadRequest(f'no name of a header: {name[:100]!r}')
    key = name.upper().replace('-', '_')
    if '_' in name or key == 'PROXY':   # X_A would pass for X-A; HTTP_PROXY would steer the application's clients
        return ''
    return sys.intern(key if key in ('CONTENT_TYPE', 'CONTENT_LENGTH') else 'HTTP_' + key)


def unquote(path):
    from urllib.parse import unquote_to_bytes           # unquote() takes four times as long for what is hostile
    return unquote_to_bytes(path.encode('latin-1')).decode('latin-1')


def target_path(method, target, environ):
    """The path of a target without / in front: * of OPTIONS, or http://host/path (host counts, and not the header)."""
    scheme, slashes, rest = target.partition('://')
    if slashes and scheme.lower() in ('http', 'https'):
        environ['HTTP_HOST'], _, path = rest.partition('/')
        if environ['HTTP_HOST'] and HOST.issuperset(environ['HTTP_HOST']):
            return '/' + path
    elif target == '*' and method == 'OPTIONS':
        return target
    raise BadRequest(f'the target {target[:100]!r}',
                     '501 Not Implemented' if method == 'CONNECT' else '400 Bad Request')


def words(value):
    """'a, B' -> ['a', 'b']: the value of a header that is a list."""
    return [word.strip(' \t') for word in value.lower().split(',')]


def content_length(value):
    if not (value.isascii() and value.isdecimal() and len(value) < 19):
        raise BadRequest(f'Content-Length {value[:30]!r}')
    return int(value)


def body_length(headers):
    """How many bytes of body follow a head; -1: chunked."""
    coding, length = headers.get('HTTP_TRANSFER_ENCODING'), headers.get('CONTENT_LENGTH')
    if coding is None:
        return content_length(length) if length is not None else 0
    if length is not None or headers['SERVER_PROTOCOL'] == 'HTTP/1.0':
        raise BadRequest('Transfer-Encoding beside Content-Length or in HTTP/1.0')
    codings = words(coding)
    if codings != ['chunked']:          # where chunked isn't the last one, nobody knows the length
        understood = codings[-1] == 'chunked' and codings.count('chunked') == 1 and all(codings)
        raise BadRequest(f'Transfer-Encoding {coding[:50]!r}',
                         '501 Not Implemented' if understood else '400 Bad Request')
    return -1


def parse_line(line):
    """'Accept: x' (str) -> ('HTTP_ACCEPT', 'x')."""
    name, colon, value = line.partition(':')
    if not colon:
        raise BadRequest(f'no header: {line[:100]!r}')
    if not line.isprintable() and controls(line.encode('latin-1')):
        raise BadRequest('a control character in the head')
    key, value = header_key(name), value.strip(' \t')
    if key == 'HTTP_HOST' and not HOST.issuperset(value):
        raise BadRequest('a Host that is no name of a host')
    return remember(HEADER_LINES, line, (key, value)) if len(line) < 256 else (key, value)


@functools.lru_cache(100)
def parse_fields(fields):
    """A head from ' HTTP/1.1' to the end of its last line (bytes) -> (what its lines are in the environ, may more
    requests follow on this connection, length of the body)."""
    protocol, *lines, _ = fields.decode('latin-1').split('\r\n')
    if protocol not in (' HTTP/1.1', ' HTTP/1.0'):
        other = protocol[:6] == ' HTTP/' and protocol[7:8] == '.' and protocol[6::2].isdecimal()
        raise BadRequest(f'the protocol {protocol.strip()!r}',
                         '505 HTTP Version Not Supported' if other else '400 Bad Request')
    if len(lines) > FIELDS_MAX:
        raise BadRequest(f'more than {FIELDS_MAX} headers', '431 Request Header Fields Too Large')
    headers = {}
    for line in lines:
        key, value = HEADER_LINES.get(line) or parse_line(line)         # many clients send the same
        if key in headers:
            if key in SINGLE:
                raise BadRequest(f'{key.replace("HTTP_", "")} is there twice')
            value = headers[key] + ('; ' if key == 'HTTP_COOKIE' else ', ') + value
        headers[key] = value
    headers.pop('', None)
    new = protocol == ' HTTP/1.1'
    if new and 'HTTP_HOST' not in headers:
        raise BadRequest('no Host')
    headers['SERVER_PROTOCOL'] = protocol[1:]
    wishes = words(headers.get('HTTP_CONNECTION', ''))
    return headers, 'close' not in wishes and (new or 'keep-alive' in wishes), body_length(headers)


def parse_start(start, environ):
    """Read a head up to ' HTTP/1.1' (bytes) into environ."""
    method, _, target = start.decode('latin-1').partition(' ')
    if method != 'GET' and not (method and TOKEN.issuperset(method)):
        raise BadRequest(NO_FIRST_LINE)
    if ' ' in target or '#' in target or not target.isprintable() and ('\t' in target or controls(start)):
        raise BadRequest('a blank, a fragment or a control character in the target')
    environ['REQUEST_METHOD'], environ['REQUEST_URI'] = method, target
    path, _, query = target.partition('?')
    if path[:1] != '/':
        path = target_path(method, path, environ)
    environ['PATH_INFO'] = path if '%' not in path else unquote(path)
    environ['QUERY_STRING'] = query


def skip_empty_lines(data):
    """Some clients end a body by one. A last \\r stays: it may be the half of one more."""
    if data[:2] == b'\r\n':
        data = data.lstrip(b'\r\n') or data[-1:].rstrip(b'\n')
    return data


def hopeless(data):
    """What is wrong with a head, or with its beginning, as the arguments of BadRequest; None: nothing so far."""
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
    return ('the head is too long', '431 Request Header Fields Too Large') if len(data) > HEAD_MAX else None


def client_address(environ, trusted):
    """Behind proxies that are trusted: who is the client? X-Forwarded-For has each proxy's client, the last
    one's at the end; what stands left of an address that isn't trusted may be invented."""
    from ipaddress import ip_address

    def trusts(address):
        parsed = ip_address(address)
        parsed = getattr(parsed, 'ipv4_mapped', None) or parsed         # how [::] sees who comes over IPv4
        return any(parsed in network for network in trusted)
    with contextlib.suppress(ValueError):               # no address (a unix socket has none)
        if environ['REMOTE_ADDR'] and not trusts(environ['REMOTE_ADDR']):       # who may use our unix socket is trusted
            return
        scheme = words(environ.get('HTTP_X_FORWARDED_PROTO', ''))[-1]
        if scheme in ('http', 'https'):
            environ['wsgi.url_scheme'] = scheme
        for address in reversed(words(environ.get('HTTP_X_FORWARDED_FOR', ''))):
            address = address.partition(':')[0] if address.count(':') == 1 else address     # some add the port
            is_proxy = trusts(address)
            environ['REMOTE_ADDR'], environ['REMOTE_PORT'] = address, ''
            if not is_proxy:
                return


# ---------------------------------------------------------------------------------------------
# 6. WSGI (PEP 3333)
#
# The application gets environ and start_response, and returns an iterable of bytes. Each thread that serves has one
# Response, for one request after the other: it checks the head, holds the application to the length that it promised,
# and sends. What there is to send becomes a job: a generator that does what can be done at once, and yields (event,
# seconds) when it has to wait, so that the worker can leave it to a thread (part 9).

SMALL = 32768                           # so much always fits into an empty socket buffer: write() can't block
IOV_MAX, READ_MAX = 1024, 65536         # the most pieces that writev(2) takes; bytes to read at once
KEEP_UP = 0.01                          # seconds that a worker spends on a job once it had to wait
SLOWEST = 500                           # bytes a second: who sends or reads less can't hold a worker for long


def unread(fd):
    """How many bytes were written that the client hasn't taken, see tcp(7) on SIOCOUTQ; 0 where nobody knows."""
    import fcntl
    with contextlib.suppress(OSError):
        return int.from_bytes(fcntl.ioctl(fd, 0x5411, bytes(4)), sys.byteorder)
    return 0


def still_unread(fd, event, seconds, before):
    """A client let us wait for so many seconds. It was too slow, unless it went on reading meanwhile: for a socket to
    count as writable it may have to read MBs. `before`, and returned: how many bytes are (still) unread."""
    left = unread(fd)
    if event != select.POLLOUT or seconds <= 0 or before - left < SLOWEST * seconds:
        raise ClientGone(errno.ETIMEDOUT, 'the client was too slow')
    return left


def wait_for(fd, event, seconds):
    left = unread(fd) if event == select.POLLOUT else 0
    while not ready_within(fd, event, seconds):
        left = still_unread(fd, event, seconds, left)


LOST = frozenset((errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH,
                  errno.ENETUNREACH, errno.ENETDOWN))


def lost(error, when):
    """What an OSError of a connection means: mostly that its client has gone."""
    return ClientGone(0, when) if error.errno in LOST else error


def read_some(fd, buffer, deadline):
    """Read at least one byte into buffer (writable), before a time.monotonic(); how many."""
    while True:
        try:
            got = os.preadv(fd, [buffer], -1, NOWAIT)
        except BlockingIOError:
            wait_for(fd, select.POLLIN, max(0, deadline - time.monotonic()))
            continue
        except OSError as error:
            if error.errno not in LOST:
                raise
            got = 0
        if not got:
            raise ClientGone(errno.ECONNRESET, 'the client closed the connection')
        return got


def send_chunks(fd, chunks, seconds):
    """A job that sends a list of bytes, and empties it. `seconds`: until the socket must be writable again each
    time, which it is when a good part of its buffer is free."""
    while chunks:
        try:
            sent = os.writev(fd, chunks[:IOV_MAX])
        except BlockingIOError:
            yield select.POLLOUT, seconds
            continue
        except OSError as error:
            raise lost(error, 'before the end of the response') from None
        done = 0
        while done < len(chunks) and sent >= len(chunks[done]):
            sent -= len(chunks[done])
            done += 1
        del chunks[:done]
        if sent:
            chunks[0] = memoryview(chunks[0])[sent:]


def send_file(fd, head, file, offset, count, seconds):
    """A job that sends head (a list of bytes), then count bytes of a file from offset; closes the file's descriptor."""
    try:
        yield from send_chunks(fd, head, seconds)
        while count:
            try:
                sent = os.sendfile(fd, file, offset, min(count, 1 << 20))
            except BlockingIOError:
                yield select.POLLOUT, seconds
                continue
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise lost(error, 'before the end of the file') from None
                data = os.pread(file, min(count, 1 << 18), offset)      # a file system without sendfile
                sent = len(data)
                yield from send_chunks(fd, [data], seconds)
            if not sent:
                raise OSError(errno.EIO, f'the file became {count} bytes shorter while it was sent')
            offset += sent
            count -= sent
    finally:
        os.close(file)


def then_drain(fd, job):
    """A job, and then: take what the client still sends, for at most 1 GiB, a minute or 2 s of silence, so that it
    reads our answer. Closing with unread bytes would reset the connection, and nginx then answers 502."""
    yield from job
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
        connection.shutdown(socket.SHUT_WR)
    os.set_blocking(fd, False)
    left, until = 1 << 30, time.monotonic() + 60
    while left > 0 and time.monotonic() < until:
        try:
            got = os.read(fd, READ_MAX)
        except BlockingIOError:
            yield select.POLLIN, 2
            continue
        if not got:
            return
        left -= len(got)


def run_a_while(fd, job):
    """Run a job, from its first wait on for KEEP_UP. Returns None when it is done, else the job."""
    until = None
    for event, _ in job:
        now = time.monotonic()
        until = until or now + KEEP_UP
        if now >= until or not ready_within(fd, event, until - now):
            return job


class EmptyInput(io.RawIOBase):
    """wsgi.input of all requests without a body: nothing to read, nothing to spoil."""

    def readinto(self, into):
        return 0

    def readable(self):
        return True

    def close(self):
        pass


class Body(io.RawIOBase):
    """A request body: what came with the head, then what the connection brings. io.BufferedReader makes wsgi.input
    of it.  left: bytes that are still to come, endless as long as the end of a chunked body (-1) isn't read.
    lend(seconds) gives the request so much more time, which is that of the client."""

    def __init__(self, fd, begun, left, timeout, limit, lend):
        self.fd, self.timeout, self.lend = fd, timeout, lend
        self.left = left if left >= 0 else math.inf
        self.begun = bytearray(begun)   # received, and not used; to delete its beginning doesn't move the rest
        self.patience = timeout         # how long we would wait: what comes slower than SLOWEST uses it up
        self.wants_continue = False     # the client waits for 100 Continue before it sends
        self.buffer, self.piece, self.bad = bytearray(READ_MAX), b'', None
        self.pieces = self.read_chunks(limit) if left < 0 else self.read_piece(left)

    def readable(self):
        return True

    def readinto(self, into):
        try:
            self.piece = self.piece or next(self.pieces, b'')
        except BadRequest as error:                     # the answer, whatever the application makes of it
            self.bad = error
            raise
        if not self.piece and self.left:                # an error, or the response, has ended it: nobody knows the rest
            raise ClientGone(0, 'before the end of the body')
        size = min(len(into), len(self.piece))
        into[:size], self.piece = self.piece[:size], self.piece[size:]
        return size

    def receive(self):
        """Wait for more from the client."""
        if self.wants_continue:
            self.wants_continue = False
            for event, _ in send_chunks(self.fd, [b'HTTP/1.1 100 Continue\r\n\r\n'], 0):
                wait_for(self.fd, event, self.patience)
        began = time.monotonic()
        self.lend(self.patience)
        try:
            got = read_some(self.fd, self.buffer, began + self.patience)
        finally:
            waited = time.monotonic() - began
            self.lend(waited - self.patience)
        self.patience = min(self.timeout, self.patience - waited + got / SLOWEST)
        self.begun += self.buffer[:got]

    def read_piece(self, size):
        """All of a plain body, or of a chunk."""
        while size:
            if not self.begun:
                self.receive()
            data = self.begun[:size]
            del self.begun[:size]
            size -= len(data)
            self.left -= len(data)
            yield data

    def read_chunks(self, limit):
        """RFC 9112 section 7.1."""
        while size := self.chunk_size():
            limit -= size
            if limit < 0:
                raise BadRequest('the body is larger than limit-post', '413 Content Too Large')
            yield from self.read_piece(size)
            if self.line():
                raise BadRequest('a chunk is longer than its size')
        for _ in range(FIELDS_MAX):
            trailer = self.line()       # nobody needs them, but they have to be in order
            if not trailer:
                self.left = 0
                return
            header_key(trailer.partition(b':')[0].decode('latin-1') if b':' in trailer else '')
        raise BadRequest('too many trailers', '431 Request Header Fields Too Large')

    def chunk_size(self):
        size, semicolon, _ = self.line().partition(b';')
        size = size.rstrip(b' \t') if semicolon else size
        if not size or len(size) > 15 or size.strip(b'0123456789abcdefABCDEF'):
            raise BadRequest(f'no size of a chunk: {size[:30]!r}')
        return int(size, 16)

    def line(self):
        while (end := self.begun.find(b'\n') + 1) == 0 and len(self.begun) <= 1024:
            self.receive()
        line = bytes(self.begun[:end])
        del self.begun[:end]
        if len(line) > 1024 or line[-2:] != b'\r\n' or controls(line) != 2:
            raise BadRequest('a bad line between chunks')
        return line[:-2]


HOP_BY_HOP = frozenset(('connection', 'keep-alive', 'proxy-authenticate', 'proxy-authorization', 'te', 'trailer',
                        'trailers', 'transfer-encoding', 'upgrade'))


def text_of(what, value):
    """A str from the application, or the one that an object of a subclass (an Enum's) holds."""
    if not isinstance(value, str):
        raise TypeError(f'{what} must be a str, not {type(value).__name__}')
    return str.__str__(value)


def status_line(status):
    """'404 Not Found' -> the same as a plain str, its line, and whether such a response has no body."""
    text = text_of('the status', status)
    if not (text[:3].isascii() and text[:3].isdecimal() and text[3:4] in ('', ' ') and text.isprintable()):
        raise ValueError(f"{text!r} is no status such as '200 OK'")
    return remember(STATUS_LINES, text, (
        text, f'HTTP/1.1 {text}\r\n', text[:3] in ('204', '304') or text[0] == '1'))


def header_start(name):
    """Check the name of a response header -> ('Name: ', its lower case if it is a special one, else 'other')."""
    text = text_of('the name of a header', name)
    if not text or not TOKEN.issuperset(text):
        raise ValueError(f'{text!r} is no name of a header')
    kind = text.lower()
    return remember(HEADER_STARTS, text, (
        f'{text}: ', kind if kind in HOP_BY_HOP or kind in ('content-length', 'date', 'server') else 'other'))


def header_value(name, value):
    """Check the value of a response header."""
    text = text_of(f'the value of {name}', value)
    if '\n' in text or '\r' in text or '\0' in text:
        raise ValueError(f'a line end or NUL in the value of the header {name}: {text!r}')
    return text


def server_headers(now):
    """Date and Server, for a time in Unix seconds; strftime() would heed the locale."""
    utc = time.asctime(time.gmtime(now))
    date = f"{utc[:3]}, {utc[8:10].replace(' ', '0')} {utc[4:7]} {utc[20:]} {utc[11:19]} GMT"
    return f'Date: {date}\r\nServer: minuwsgi\r\n'.encode()


class Response:
    """One response after the other. start_response() takes the head; write() and finish() send.

    length: promised by the application, None: unknown, -1: there is no body.  left: what is still to be sent of it.
    size: bytes of the body that were sent.  sent: is the head on its way?  ending: 'cut' the connection, or 'drain'
    what comes.  http: '' or the version.  Of HTTP alone: keep the connection, chunked, body (that of the request), own
    (the names of Date and Server if the application gave them, run together)."""

    def __init__(self, config):
        self.timeout, self.job_timeout = config.socket_timeout, config.http_timeout
        self.extra = ''.join(f'{header.strip()}\r\n' for header in config.add_header)
        self.extra = self.extra.encode('utf-8', 'surrogateescape') + b'\r\n'          # as it stands in the file
        self.status = self.length = self.left = self.body = None
        self.ending = self.http = self.own = ''
        self.head = b''
        self.sent = self.keep = self.chunked = self.head_only = False
        self.headers = self.size = self.next_second = 0

    def start_response(self, status, headers, exc_info=None):
        if self.status is not None:
            if exc_info is None:
                raise AssertionError('start_response() was called a second time, without exc_info')
            if self.sent:
                try:
                    raise exc_info[1].with_traceback(exc_info[2])
                finally:
                    exc_info = None
        status, head, no_body = type(status) is str and STATUS_LINES.get(status) or status_line(status)
        length, own = None, ''
        for name, value in headers:
            start, kind = HEADER_STARTS.get(name) or header_start(name)
            if type(value) is not str or not value.isprintable():
                value = header_value(name, value)
            if kind != 'other':
                if kind == 'content-length':
                    if not value.isdecimal():
                        raise ValueError(f'Content-Length is {value!r}')
                    length = int(value)
                elif kind in HOP_BY_HOP:                # the connection is ours, as with gunicorn
                    self.keep = self.keep and value.lower() != 'close'
                    continue
                else:
                    own += kind
            head = f'{head}{start}{value}\r\n'
        self.head, self.headers, self.own = head.encode('latin-1'), len(headers), own
        self.length = self.left = length
        if no_body or self.head_only:
            self.length, self.left = -1, 0
        self.status = status
        return self.write

    def take_head(self, size=None):
        """The whole head as bytes, to be sent now with what comes first; size: of the whole body, if that is known."""
        if self.status is None:
            raise AssertionError("the application didn't call start_response()")
        if self.http:
            if self.left is None:                       # no need of HTTP's chunks
                self.left = size
            self.head += self.http_headers() + self.extra
        else:
            self.head += self.extra
        self.sent, self.size = True, 0
        return self.head

    def http_headers(self):
        """What HTTP adds to a head; it can't be known before there is something to send."""
        now = time.monotonic()
        if now >= self.next_second:
            date = time.time()                          # gmtime() alone has a clock that is some ms late
            self.next_second, self.server = now + 1 - date % 1, server_headers(date)
        headers = self.server
        if self.own:                                    # the application has given Date or Server
            headers = b''.join(line for line in headers.splitlines(True)
                               if line.lower().partition(b':')[0].decode() not in self.own)
        if self.left is None:
            self.chunked = self.http == 'HTTP/1.1'
            if self.chunked:
                headers += b'Transfer-Encoding: chunked\r\n'
            else:                                       # the end of the connection is the end of the body
                self.keep, self.ending = False, 'drain'
        elif self.length is None:
            headers += b'Content-Length: %d\r\n' % self.left
        if self.body is not None and self.body.left:    # the application has not read it all, or could not
            if self.body.bad:
                raise self.body.bad
            self.keep = self.body.wants_continue = False        # its rest may never come
        if not self.keep:
            headers += b'Connection: close\r\n'
        elif self.http == 'HTTP/1.0':
            headers += b'Connection: keep-alive\r\n'
        return headers

    def frame(self, chunks, whole=False):
        """Hold chunks to the promised length; put the head and the sizes of chunks round them. whole: are they all?"""
        size = sum(map(len, chunks))
        framed = [] if self.sent else [self.take_head(size if whole else None)]         # never the application's own
        if self.left is not None:
            if size > self.left:
                if self.length != -1:
                    log_now_and_then('length', 'the application sent more than its Content-Length; that is left out')
                chunks, size = [b''.join(chunks)[:self.left]], self.left
            self.left -= size
        self.size += size
        return framed + ([b'%x\r\n' % size, *chunks, b'\r\n'] if self.chunked and size else [*chunks])

    def write(self, data):
        """PEP 3333's write(): send data (bytes) now, and wait here, since the application wants to go on."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f'the body must be made of bytes, not of {type(data).__name__}')
        data = bytes(data)
        if not self.sent and self.length == len(data) < SMALL:
            job = self.send_small(data)
        else:
            self.unblock()
            job = send_chunks(self.fd, self.frame([data] if data else []), self.timeout)
        for event, _ in job or ():
            wait_for(self.fd, event, self.timeout)

    def send_small(self, body):
        """Send head and whole body (bytes) by one write(); the job that is left, or None."""
        size = len(body)
        data = self.take_head(size) + body
        self.size, self.left = size, 0
        if len(data) > SMALL:                           # because of the head
            self.unblock()
        try:
            sent = os.write(self.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise lost(error, 'before the response') from None
        if sent == len(data):
            return None
        self.unblock()
        return run_a_while(self.fd, send_chunks(self.fd, [data[sent:]], self.job_timeout))

    def finish(self, result):
        """Send what the application returned; the job that is left if the client doesn't keep up, else None."""
        if type(result) is list and len(result) == 1 and not self.sent:
            chunk = result[0]
            if type(chunk) is bytes and (self.length is None or self.length == len(chunk)) and len(chunk) < SMALL:
                return self.send_small(chunk)
        try:
            if type(result) is bytes:
                result = [result]
            job = self.file_job(result) if type(result) is FileWrapper else self.list_job(result)
            if job is None:
                self.write_each(result)
                job = self.list_job([])
            return run_a_while(self.fd, job)
        finally:
            try:
                if hasattr(result, 'close'):
                    result.close()
            except Exception:                           # the response was not harmed by it
                log_exception("close() of the application's result failed")

    def write_each(self, chunks):
        """write() what comes from an iterator. When nothing more may be sent, what still comes has a second: nobody
        would see the client go, and a stream without end would hold us."""
        until = math.inf
        for chunk in chunks:
            if chunk == b'':                            # PEP 3333: the head may still be changed
                continue
            if self.sent and self.left == 0:
                until = min(until, time.monotonic() + 1)
                if time.monotonic() > until:
                    break
            self.write(chunk)

    def list_job(self, chunks):
        """A job that sends a list or tuple of bytes and ends the response; None for what has to be iterated over."""
        if chunks is None:
            raise TypeError('the application returned None: is a `return` missing?')
        if type(chunks) not in (list, tuple) or not all(type(chunk) is bytes for chunk in chunks):
            return None
        framed = self.frame(chunks, whole=True)
        if self.chunked:
            framed.append(b'0\r\n\r\n')
        if self.left:
            self.cut(f'the application sent {self.left} bytes less than its Content-Length')
        if framed:
            self.unblock()
        return send_chunks(self.fd, framed, self.job_timeout)

    def file_job(self, wrapper):
        """A job that sends a regular file from where it stands; None where it has to be read."""
        file = wrapper.filelike
        try:
            fd, offset = file.fileno(), file.tell()
            status = os.fstat(fd)
        except (AttributeError, OSError, ValueError):
            return None
        if self.chunked or not stat.S_ISREG(status.st_mode) or not isinstance(getattr(file, 'raw', file), io.FileIO):
            return None                                 # that of a GzipFile has other bytes
        size = max(0, status.st_size - offset)
        head = [] if self.sent else [self.take_head(size)]
        if self.left is not None and self.left > size:
            self.cut(f'the file has {self.left - size} bytes less than the Content-Length')
        count = size if self.left is None else min(size, self.left)
        self.size += count
        self.unblock()
        return send_file(self.fd, head, os.dup(fd), offset, count, self.job_timeout)

    def cut(self, why):
        """The client must not take for whole what isn't."""
        log(f'{why}; the connection is cut')
        self.keep, self.ending = False, 'cut'

    def unblock(self):
        if self.blocking:
            os.set_blocking(self.fd, False)
            self.blocking = False


# ---------------------------------------------------------------------------------------------
# 7. Static files
#
# If an option asks for static files, the application is wrapped in another, which answers GET and HEAD for regular
# files and leaves everything else to it. No path with .. in it is served, and what a path names is followed through
# all links before it is compared with the directory that it must be in; so no spelling leads out. CGI scripts (part 8)
# are found in the same way.

def in_words(start_response, status, why, *headers):
    """Answer in plain text."""
    text = f'{status}: {why}\n'.encode()
    headers += ('Content-Type', 'text/plain; charset=utf-8'), ('Content-Length', str(len(text)))
    start_response(status, list(headers))
    return [text]


def mount_points(values):
    """'/prefix=target' or 'target' -> (prefix, target), for find_files()."""
    pairs = [value.split('=', 1) if '=' in value else ('', value) for value in values]
    return [(prefix.strip().rstrip('/'), os.path.abspath(target.strip())) for prefix, target in pairs]


def find_files(mounts, path, indexes, safe=()):
    """What a path names at the mount points: (file, the beginning of the path that names it, the rest, its root).
    For a directory it is the first of the indexes that is there."""
    if '..' in path.split('/') or len(path) > 4096:
        return
    for prefix, root in mounts:
        if not f'{path}/'.startswith(f'{prefix}/'):
            continue
        below = path[len(prefix):]
        end = 0
        while os.path.isdir(root + below[:end]) and end < len(below):
            end = (below + '/').find('/', end + 1)
        name = below[:end]
        names = [f"{name.rstrip('/')}/{index}" for index in indexes] if os.path.isdir(root + name) else [name]
        name = next((name for name in names if os.path.isfile(root + name)), None)
        if name is not None:
            file = os.path.realpath(root + name)
            if any(os.path.commonpath((top, file)) == top for top in (os.path.realpath(root), *safe)):
                yield file, prefix + name, below[len(name):], root


def expiry(value):
    """'*.css 3600' -> (what tells whether a path matches, 3600); a suffix, a glob or, as in uWSGI, a regex."""
    import fnmatch
    import re
    try:
        pattern, seconds = value.replace('=', ' ').rsplit(None, 1)
        if not re.search(r'[\\^$|(+]|\.\*', pattern):
            pattern = fnmatch.translate(pattern if pattern[:1] in '/*' else '*' + pattern)
        return re.compile(pattern).search, max(0, min(int(seconds), 1 << 31))
    except (ValueError, re.error):
        raise ConfigError(f'static-expires = {value}: PATTERN SECONDS is expected, such as *.css 3600') from None


def is_fresh(environ, tag, modified):
    """Has the client got this version (RFC 9110, 13.2.2)?"""
    known = environ.get('HTTP_IF_NONE_MATCH')
    if known is not None:
        return known.strip() == '*' or tag in [one.strip().replace('W/', '', 1) for one in known.split(',')]
    from email.utils import parsedate_to_datetime
    try:
        return parsedate_to_datetime(modified) <= parsedate_to_datetime(environ['HTTP_IF_MODIFIED_SINCE'])
    except (LookupError, TypeError, ValueError, OverflowError):         # there is none, or it isn't a date
        return False


def byte_range(environ, size, versions):
    """(status, bytes of the file as a range()) for what Range and If-Range ask; the whole file if that isn't
    understood, or there are several ranges (RFC 9110, 14.2)."""
    import re
    found = re.fullmatch('bytes *= *([0-9]{0,18}) *- *([0-9]{0,18})', environ.get('HTTP_RANGE', '').strip(), re.I)
    begin, end = found.groups() if found else ('', '')
    valid = (begin or end) and not (begin and end and int(begin) > int(end))
    if not valid or environ['REQUEST_METHOD'] != 'GET' or environ.get('HTTP_IF_RANGE', versions[0]) not in versions:
        return '200 OK', range(size)
    part = range(size)[int(begin):int(end or size) + 1] if begin else range(max(0, size - int(end)), size)
    return '206 Partial Content' if part else '416 Range Not Satisfiable', part


def send_static(environ, start_response, file, seconds):
    """Answer with an open file, a part of it, or that the client's copy is good."""
    import mimetypes
    from email.utils import formatdate
    status = os.fstat(file.fileno())
    size, modified = status.st_size, formatdate(int(status.st_mtime), usegmt=True)
    tag = f'"{status.st_mtime_ns:x}-{size:x}"'
    headers = [('Last-Modified', modified), ('ETag', tag), ('Accept-Ranges', 'bytes')]
    if seconds is not None:
        headers += ('Expires', formatdate(time.time() + seconds, usegmt=True)), ('Cache-Control', f'max-age={seconds}')
    answer, part = byte_range(environ, size, (tag, modified))
    if is_fresh(environ, tag, modified):
        start_response('304 Not Modified', headers)
        return FileWrapper(file)                        # which closes it
    if answer[:3] == '416':
        file.close()
        return in_words(start_response, answer, f'{size} bytes', ('Content-Range', f'bytes */{size}'))
    if answer[:3] == '206':
        headers.append(('Content-Range', f'bytes {part[0]}-{part[-1]}/{size}'))
    kind, coding = mimetypes.guess_type(file.name)
    kind = {None: kind, 'gzip': 'application/gzip'}.get(coding)         # a .gz is meant to stay one
    headers += ('Content-Type', kind or 'application/octet-stream'), ('Content-Length', str(len(part)))
    start_response(answer, headers)
    file.seek(part.start)
    return FileWrapper(file)


def with_static_files(config, application):
    """The application, behind the static files that the options name."""
    mounts = mount_points(f'={directory}' for directory in config.check_static) + mount_points(config.static_map)
    mounts += [(prefix, target + prefix) for prefix, target in mount_points(config.static_map2)]
    if not mounts:
        return application
    import mimetypes
    mimetypes.init()                                    # once, before the fork
    for _, target in mounts:
        try:
            os.stat(target)
        except OSError as error:
            log(f'static files: {target}: {error.strerror}')
    safe = [os.path.realpath(directory) for directory in config.static_safe]
    expires = [expiry(value) for value in config.static_expires]

    def static_or_application(environ, start_response):
        if environ['REQUEST_METHOD'] in ('GET', 'HEAD'):
            path = os.fsdecode(environ['PATH_INFO'].encode('latin-1'))
            for name, _, rest, _ in find_files(mounts, path, config.static_index, safe):
                seconds = next((seconds for matches, seconds in expires if matches(path)), None)
                try:
                    if not rest:
                        return send_static(environ, start_response, open(name, 'rb', buffering=0), seconds)
                except OSError as error:
                    log_now_and_then('static', f'static files: {name}: {error.strerror}')
        return application(environ, start_response)
    return static_or_application


# ---------------------------------------------------------------------------------------------
# 8. Other languages
#
# Any program can be the worker of a master that owns the socket: with `worker-exec` each worker becomes a command that
# finds the listening socket at its descriptor 0. php-cgi speaks FastCGI there, a Go program what it likes. For Ruby and
# Perl the program stands here: the protocol of part 4 in two other languages. Both read a body whole, a large one into
# a file, before they call the application; so no byte is left unread that would reset the connection. The master stops
# them by SIGTERM, which they heed between two requests.

RACK = r'''
require 'rack'; require 'socket'; require 'stringio'; require 'tempfile'
app = [Rack::Builder.parse_file($0 = File.expand_path(ARGV[0]))].flatten.first     # Rack 2: [app, options]
ERROR = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
server, (stop, tell) = Socket.for_fd(0), IO.pipe
trap(:TERM) { tell.write_nonblock('.', exception: false) }
until IO.select([server, stop])[0].include? stop
  client, = server.accept_nonblock(exception: false)
  next if client == :wait_readable                              # another worker was faster
  begin
    start, body, input = ERROR, nil, nil
    modifier, size = client.read(4).to_s.unpack('Cv')
    next unless size && modifier < 32 && (block = client.read(size).to_s).bytesize == size
    block, env = StringIO.new(block), { 'SCRIPT_NAME' => '' }
    until block.eof?
      name, value = Array.new(2) { block.read(block.read(2).unpack1('v')) }
      first = name.start_with?('HTTP_') && env[name]            # a header that comes twice
      env[name] = first ? first + (name == 'HTTP_COOKIE' ? '; ' : ', ') + value : value
    end
    env.delete_if { |key, text| key =~ /\AHTTP_(PROXY|CONTENT_(TYPE|LENGTH))\z/ || key =~ /\ACONTENT_/ && text == '' }
    length = env['CONTENT_LENGTH'].to_i
    input = (length > 65_536 ? Tempfile.new.tap(&:unlink) : StringIO.new(String.new)).binmode
    next if IO.copy_stream(client, input, length) < length || input.rewind > 0      # the client left
    env.update('rack.version' => [1, 3], 'rack.input' => input, 'rack.errors' => $stderr, 'rack.run_once' => false,
               'rack.multithread' => false, 'rack.multiprocess' => true,
               'rack.url_scheme' => env['HTTPS'] == 'on' ? 'https' : env['REQUEST_SCHEME'] || 'http')
    status, headers, body = app.call(env)
    lines = headers.flat_map do |key, text|                     # several values: lines in Rack 2, an array in Rack 3
      [text].flatten.join("\n").lines.map { |line| "#{key}: #{line}".delete("\r\n") + "\r\n" }
    end
    start = "HTTP/1.1 #{status.to_i} #{Rack::Utils::HTTP_STATUS_CODES[status.to_i]}\r\n#{lines.join}\r\n"
    send = ->(part) { head, start = start, ''; client.write(head, part) }
    body.respond_to?(:each) ? body.each(&send) : (send.(''); body.call(client)) if env['REQUEST_METHOD'] != 'HEAD'
    send.('') unless start.empty?
  rescue Exception => error
    warn error.full_message(highlight: false) unless start.empty? && error.is_a?(Errno::EPIPE)
    client.write(ERROR) rescue nil unless start.empty?
  ensure
    [body, input, client].each { |thing| thing.close if thing.respond_to? :close rescue warn $!.full_message }
  end
end
'''

PSGI = r'''
use strict; use warnings; use Carp 'longmess'; use HTTP::Status 'status_message'; use Plack::Util;
my $app = Plack::Util::load_psgi($0 = shift);
my ($client, $start, $head_only, $trace, $stop);
$SIG{TERM} = sub { $stop = 1 }; $SIG{PIPE} = 'IGNORE'; $SIG{__DIE__} = sub { $trace = longmess(@_) };
sub request { my ($head, $block, $memory, $data, %env);         # the packet and the body -> the environment
    my ($modifier, $size) = unpack 'Cv', read($client, $head, 4) ? $head : '';
    return unless $size && $modifier < 32 && read($client, $block, $size) == $size;
    my @fields = unpack '(v/a)*', $block;
    while (my ($name, $value) = splice @fields, 0, 2) {
        my $again = $name =~ /^HTTP_/ && exists $env{$name};    # a header that comes twice
        $env{$name} = $again ? join $name eq 'HTTP_COOKIE' ? '; ' : ', ', $env{$name}, $value : $value;
    }
    delete @env{qw(HTTP_PROXY HTTP_CONTENT_TYPE HTTP_CONTENT_LENGTH)}; my $left = $env{CONTENT_LENGTH} || 0;
    open my $input, '+>', $left > 65_536 ? undef : \$memory or die "no temporary file: $!";
    while ($left > 0) { $left -= read($client, $data, $left < 8192 ? $left : 8192) || return; print $input $data }
    seek $input, 0, 0;
    return { SCRIPT_NAME => '', PATH_INFO => '', %env, 'psgi.version' => [1, 1], 'psgi.run_once' => '',
        'psgi.input' => $input, 'psgix.input.buffered' => 1, 'psgi.errors' => \*STDERR, 'psgi.multithread' => '',
        'psgi.multiprocess' => 1, 'psgi.nonblocking' => '', 'psgi.streaming' => 1,
        'psgi.url_scheme' => ($env{HTTPS} || '') eq 'on' ? 'https' : $env{REQUEST_SCHEME} || 'http' };
}
sub part {                                                      # send the head, if it wasn't, and some of the body
    (my $data, $start) = ($head_only ? $start : $start . $_[0], '');
    while (length $data) { substr $data, 0, syswrite($client, $data) // ($!{EINTR} ? 0 : die \'the client left'), '' }
}
sub respond { my ($status, $headers, $body) = @{$_[0]};
    my $head = sprintf 'HTTP/1.1 %d %s', $status, status_message(int $status) // '';
    Plack::Util::header_iter($headers, sub { $head .= "\r\n" . "$_[0]: $_[1]" =~ tr/\r\n//dr });
    $start = "$head\r\n\r\n";
    Plack::Util::foreach($body, \&part) if $body;
    part('') if !$body || length $start;
    return Plack::Util::inline_object(write => \&part, close => sub {});
}
until ($stop) {
    accept $client, STDIN or $!{EINTR} ? next : die "accept: $!";
    my $env = request() or next;
    ($start, $head_only) = ("HTTP/1.1 500 Internal Server Error\r\n\r\n", $env->{REQUEST_METHOD} eq 'HEAD');
    next if eval { my $answer = $app->($env); ref $answer eq 'CODE' ? $answer->(\&respond) : respond($answer); 1 };
    print STDERR $trace unless ref $@ eq 'SCALAR'; eval { part('') } if length $start;
} continue { close $client if $client }
'''


def worker_command(config):
    """The command that each worker becomes, as a list; None where the workers serve Python."""
    if config.rack:
        return ['ruby', '-e', RACK, config.rack]
    if config.psgi:
        return ['perl', '-e', PSGI, config.psgi]
    if config.worker_exec:
        import shlex
        return shlex.split(config.worker_exec)


def become(command, sockets, master):
    """Execute a command in the place of this process. The sockets are its descriptors 3, 4 and so on, as
    sd_listen_fds(3) has it, and the first of them is 0 too. Comes back only if that fails."""
    import ctypes
    import fcntl
    if master and sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG: when the master dies, however it dies
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:    # Python ignores some: it is inherited
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # comes from a terminal to the whole group: the master decides
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    free = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 3 + len(sockets)) for one in sockets]
    for target, fd in enumerate(free, 3):
        os.dup2(fd, target)
    os.dup2(free[0], 0)
    os.environ.update(LISTEN_FDS=str(len(free)), LISTEN_PID=str(os.getpid()))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        log(f"minuwsgi: can't execute {command[0]}: {error.strerror}")


# CGI (RFC 3875) is a WSGI application that runs a program for each request. Its input is a file with the whole body:
# nginx stops sending one when an answer begins, so a program that writes while it reads would wait for ever. Its output
# is streamed. It leads a process group, which is killed when the client leaves or the program is silent for too long.

CGI_NAMES = ('HTTP', 'SERVER_', 'REMOTE_', 'REQUEST_', 'QUERY_', 'CONTENT_', 'DOCUMENT_', 'PATH_', 'SCRIPT_', 'AUTH_',
             'SSL_CLIENT_')             # variables of a request begin so, as with Apache's suexec


def cgi_variables(environ, root, file, name, info):
    """The environment of a CGI program: the server's own and the request's, but for LD_PRELOAD and the like."""
    variables = {**os.environ, 'DOCUMENT_ROOT': root}
    variables.update((key, os.fsdecode(value.encode('latin-1'))) for key, value in environ.items()
                     if type(value) is str and key.startswith(CGI_NAMES))
    variables.update(GATEWAY_INTERFACE='CGI/1.1', SERVER_SOFTWARE=f'minuwsgi/{__version__}', REDIRECT_STATUS='200',
                     SCRIPT_NAME=name, SCRIPT_FILENAME=file, PATH_INFO=info,
                     PATH_TRANSLATED=info and variables['DOCUMENT_ROOT'] + info)
    variables.pop('HTTP_PROXY', None)                   # a header must not steer the clients within the program
    left_out = 'PATH_INFO', 'PATH_TRANSLATED', 'CONTENT_LENGTH', 'CONTENT_TYPE'         # if they are empty
    return {key: value for key, value in variables.items() if value or key not in left_out}


class CgiOutput(io.RawIOBase):
    """What a program writes while it isn't silent for too long and the client is there. close() ends the program."""

    def __init__(self, program, client, seconds):
        self.program, self.client, self.seconds, self.poll = program, client, seconds, select.poll()
        self.poll.register(program.stdout, select.POLLIN)
        self.poll.register(client, 0)                   # for POLLHUP and POLLERR

    def readable(self):
        return True

    def readinto(self, into):
        events = dict(self.poll.poll(self.seconds * 1000))
        if self.client in events:
            raise ClientGone(0, 'during a CGI program')
        if not events:
            raise TimeoutError(errno.ETIMEDOUT, f'it was silent for {self.seconds} s')
        return self.program.stdout.readinto(into)

    def close(self):
        if self.program.returncode is None:             # not reaped yet, so the pid is still its own
            os.killpg(self.program.pid, signal.SIGKILL)
        with self.program:                              # closes its pipe, waits
            super().close()


def pass_head(output, start_response):
    """Read the head of a program's answer, and give it to start_response(), which refuses what is wrong."""
    from http import HTTPStatus
    headers = []
    while (line := output.readline(HEAD_MAX)) not in (b'\n', b'\r\n'):
        name, colon, value = line.decode('latin-1').rstrip('\r\n').partition(':')
        if not colon or len(headers) == FIELDS_MAX:
            raise ValueError(f'it sent {line[:80]!r} in its head' if line else 'it ended without a head')
        headers.append((name, value.strip(' \t')))
    known = {name.lower(): value for name, value in headers}
    status = known.get('status') or ('302 Found' if 'location' in known else '200 OK')
    with contextlib.suppress(ValueError):
        status = f'{status} {HTTPStatus(int(status)).phrase}'           # it was only a number
    not_passed = HOP_BY_HOP | {'status'}
    start_response(status, [(name, value) for name, value in headers if name.lower() not in not_passed])


def run_cgi(command, variables, body, seconds, response):
    """Run a program for one request: yields the body of its answer."""
    import shutil
    import subprocess
    import tempfile
    try:
        with tempfile.TemporaryFile() as file:
            shutil.copyfileobj(body, file)
            if file.tell():
                variables['CONTENT_LENGTH'] = str(file.tell())          # a chunked body has none
            file.seek(0)
            program = subprocess.Popen(command, bufsize=0, stdin=file, stdout=subprocess.PIPE, env=variables,
                                       cwd=os.path.dirname(command[-1]), start_new_session=True)
        with io.BufferedReader(CgiOutput(program, response.fd, seconds), READ_MAX) as output:
            pass_head(output, response.start_response)
            yield from iter(output.read1, b'')
            with contextlib.suppress(subprocess.TimeoutExpired):        # it closed its output, and goes on
                if program.wait(1) < 0:
                    raise ChildProcessError(f'it died: {signal.Signals(-program.returncode).name}')
    except ClientGone:
        raise
    except (OSError, ValueError) as error:              # the program's fault
        status = '504 Gateway Timeout' if isinstance(error, TimeoutError) else '502 Bad Gateway'
        why = f"the program failed: {getattr(error, 'strerror', None) or error}"
        log(f'{command[-1]}: {why}')
        if response.status:                             # its head may be on its way: only a cut can tell
            raise ClientGone(0, why) from None
        yield from in_words(response.start_response, status, why)


def cgi_application(config, fallback):
    """A WSGI application that runs the programs of `cgi`, and leaves what isn't there to fallback (or None)."""
    import shlex
    from urllib.parse import quote
    mounts = sorted(mount_points(config.cgi), key=lambda mount: -len(mount[0]))
    helpers = {extension: shlex.split(command)
               for extension, _, command in (item.partition('=') for item in config.cgi_helper)}

    def application(environ, start_response):
        path = os.fsdecode((environ['SCRIPT_NAME'] + environ['PATH_INFO']).encode('latin-1'))
        for file, name, info, root in find_files(mounts, path, config.cgi_index):
            if name.startswith(f'{path}/'):             # of a directory: links in its pages need the slash
                query = environ['QUERY_STRING']
                where = f"/{quote(os.fsencode(path.strip('/')))}/{query and '?' + query}"
                return in_words(start_response, '301 Moved Permanently', where, ('Location', where))
            helper = helpers.get(os.path.splitext(file)[1], [])
            if config.cgi_allowed_ext and not file.endswith(config.cgi_allowed_ext):
                return in_words(start_response, '403 Forbidden', 'cgi-allowed-ext does not allow this extension')
            if not helper and not os.access(file, os.X_OK):
                return in_words(start_response, '403 Forbidden',
                                'the file is not executable, and there is no cgi-helper for its extension')
            return run_cgi([*helper, file], cgi_variables(environ, root, file, name, info), environ['wsgi.input'],
                           config.cgi_timeout, start_response.__self__)
        if fallback:
            return fallback(environ, start_response)
        return in_words(start_response, '404 Not Found', 'there is no such program')
    return application


# ---------------------------------------------------------------------------------------------
# 9. Offload threads
#
# A client that reads slowly must not hold a worker. The worker runs a job (part 6) itself as long as the client keeps
# up, which is cheapest; then the job moves to a thread, which waits for hundreds of descriptors at a time. The GIL
# doesn't hold it up: sendfile(2) and writev(2) run without it.

def start_thread(function, *arguments, name=None):
    """A thread that ends with the process. (`threading` costs memory: it is imported where there is one.)"""
    import threading
    thread = threading.Thread(target=function, args=arguments, name=name, daemon=True)
    thread.start()
    return thread


class Offloader:
    """A thread of a worker that runs jobs. It starts with the first job."""

    def __init__(self):
        self.inbox = collections.deque()                # (fd, job, done)
        self.thread, self.poll = None, select.epoll()
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        self.poll.register(self.wake_read, select.EPOLLIN)
        self.jobs = {}          # fd -> (job, done, event that it waits for, seconds for it, unread bytes, deadline)
        self.ending = False                             # is there one between jobs and the end of its done()?

    def take(self, fd, job, done):
        """Queue a job for the thread. When it has ended, done(fd, ok) is called and owns fd; ok: all was sent."""
        try:
            self.start()
        except RuntimeError as error:                   # no memory for a thread
            log_now_and_then('offload', f'offload: {error}')
            return done(fd, False)
        self.inbox.append((fd, job, done))
        os.write(self.wake_write, b'.')

    def start(self):
        if self.thread is None:
            self.thread = start_thread(self.run, name='offload')

    def run(self):
        closing = False
        while self.jobs or not closing:
            first = min((deadline for *_, deadline in self.jobs.values()), default=None)
            for fd, _ in self.poll.poll(first and max(0, first - time.monotonic())):
                if fd != self.wake_read:
                    self.step(fd)
                    continue
                closing = b'q' in os.read(fd, 4096)
                while self.inbox:
                    fd, job, done = self.inbox[0]
                    self.jobs[fd] = job, done, 0, 0, 0, 0.0
                    self.inbox.popleft()                # now: Worker.has_jobs() must find it somewhere
                    self.step(fd)
            now = time.monotonic()
            for fd in [fd for fd, (*_, deadline) in self.jobs.items() if deadline <= now]:
                job, done, event, seconds, left, _ = self.jobs[fd]
                try:
                    self.jobs[fd] = job, done, event, seconds, still_unread(fd, event, seconds, left), now + seconds
                except ClientGone:
                    self.end(fd, False)

    def step(self, fd):
        """Run a job until it has to wait, or is done."""
        job, done, known, *_ = self.jobs[fd]
        try:
            event, seconds = next(job)
            if event != known:
                (self.poll.modify if known else self.poll.register)(fd, event)
            self.jobs[fd] = job, done, event, seconds, unread(fd), time.monotonic() + seconds
        except StopIteration:
            self.end(fd, True)
        except Exception as error:
            if not isinstance(error, ClientGone) and getattr(error, 'errno', None) not in LOST:
                log_now_and_then('offload', f'offload: {error}')
            self.end(fd, False)

    def end(self, fd, ok):
        self.ending = True
        job, done, known, *_ = self.jobs.pop(fd)
        try:
            if known:
                self.poll.unregister(fd)
            done(fd, ok)
            job.close()
        except OSError as error:                        # the application has closed it, or the file
            log(f'offload: {error.strerror}')
        self.ending = False                             # not before: at a stop its connection is waited for

    def finish(self):
        """Wait until all jobs are done."""
        if self.thread is not None:
            os.write(self.wake_write, b'q')
            self.thread.join()


# ---------------------------------------------------------------------------------------------
# 10. Serving requests
#
# A core serves one request at a time; a worker has one for each thread. Core.serve() is the hot path: for a small
# request behind nginx it makes four system calls, accept4, preadv2, write, close. With one socket and one thread it
# waits in accept() itself; a select before it would be one more call, and would wake all workers for a connection that
# one gets. With several sockets, HTTP or threads, Core.wait() stands in for accept(): it watches listeners and kept
# HTTP connections at once, so that those that are silent or slow hold nobody.

# A row of the scoreboard, one for each core, in shared memory: the last packet, then these numbers.
# READY: from which time.monotonic() on the worker counts as ready (1 is long ago); 0: it doesn't yet.
# STARTED: when its request began, later by what its client takes (so in the future while we wait for it); 0: there is
# none; -1: its head is still coming. RUNNING: seconds in all.
# LEAVING: does it want a successor? HEARD: does it know that it must stop?
PID, NUMBER, READY, STARTED, REQUESTS, ERRORS, RUNNING, LEAVING, HEARD = range(9)
NUMBERS = PACKET_MAX + 261              # where they begin: Expected.rest() looks up to 258 bytes beyond a bad packet
ROW_SIZE = NUMBERS + 9 * 8


def memory_of(pid='self'):
    """(address space, resident memory) of a process in bytes, see proc(5) on statm; zeros where it can't be read."""
    pages = (read_if_there(f'/proc/{pid}/statm') or '0 0').split()
    return int(pages[0]) * mmap.PAGESIZE, int(pages[1]) * mmap.PAGESIZE


class Row:
    """What one core of a worker is doing; written by its worker, which reads its packets right into the row. So the
    master can name the request at which a worker died, and it costs nothing."""

    def __init__(self):
        self.memory = mmap.mmap(-1, ROW_SIZE)           # anonymous, shared over fork()
        self.packet = memoryview(self.memory)[:PACKET_MAX]
        self.numbers = memoryview(self.memory)[NUMBERS:].cast('d')

    def request(self):
        """'GET /path' of the request that is, or was last, in the works."""
        if self.memory[0] > WSGI_STRIP:                 # the first line of a request over HTTP
            return ' '.join(self.memory[:512].split(b'\r\n')[0].decode('latin-1').split(' ')[:2])
        try:
            variables = dict(unpack_vars(self.memory[4:4 + int.from_bytes(self.memory[1:3], 'little')]))
        except BadRequest:
            return '?'
        return f"{variables.get('REQUEST_METHOD', '?')} {variables.get('REQUEST_URI', '?')}"


class Connection:
    """A client's connection over HTTP, between and during its requests."""

    __slots__ = ('fd', 'template', 'address', 'port', 'data', 'end', 'fields', 'new_environ', 'keep', 'length',
                 'deadline', 'events')

    def __init__(self, fd, template, address):
        self.fd, self.template = fd, template
        self.address, self.port = (address[0], str(address[1])) if type(address) is tuple else ('', '')
        self.data, self.end = b'', -1                   # read, but not yet used; where the head ends in it
        self.fields = None                              # of the last head, see learn()
        self.deadline = None                            # a time.monotonic(), once it is parked; until then it blocks
        self.events = 0                                 # what the worker's epoll watches it for; 0: nothing

    def learn(self, fields):
        """Read a head from ' HTTP/1.1' on, and keep what it says: clients mostly send the same again. The environ."""
        parse = parse_fields if self.fields is None and len(fields) < 4096 else parse_fields.__wrapped__
        headers, self.keep, self.length = parse(fields)         # the cache is for first requests
        environ = self.template | headers
        environ['REMOTE_ADDR'], environ['REMOTE_PORT'] = self.address, self.port
        self.fields, self.new_environ = fields, environ.copy
        return environ.copy() if self.keep else environ


def strip_script_name(environ):
    """For modifier1 30: the web server left SCRIPT_NAME in front of PATH_INFO."""
    script, path = environ['SCRIPT_NAME'].rstrip('/'), environ['PATH_INFO']
    if script and (path == script or path.startswith(script + '/')):
        environ['SCRIPT_NAME'], environ['PATH_INFO'] = script, path[len(script):]


def plain_answer(status, why, more=b''):
    """(head, body) of a response in plain text, for what the application can't answer."""
    body = (f'{status}: {why}\n' if why else f'{status}\n').encode()
    head = (f'HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n'
            'Connection: close\r\n')
    return head.encode() + more + b'\r\n', body


def close_hard(fd, ok=False):
    """Close a connection so that the client can't take the response for whole: over TCP by a reset. Over a unix
    socket only its Content-Length tells."""
    with socket.socket(fileno=fd) as connection, contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')


def close_after(fd, ok):
    """The end of a job: close as is right."""
    os.close(fd) if ok else close_hard(fd)


class Harakiri(BaseException):
    """Breaks a request off that took longer than the option harakiri allows."""


class KeptConnections:
    """What Core.wait() watches: the listeners, and the HTTP connections that no core serves. Such a connection is
    in one place at a time: parked here, claimed by the core that serves it (by parked.pop()), or lent to an
    Offloader; only its holder closes it. It stays with its worker, and waits while all cores of that are busy. With
    threads, an event is for one of them alone (EPOLLONESHOT)."""

    def __init__(self, listeners, config, dead_end):
        self.listeners, self.parked = listeners, {}     # parked: descriptor -> Connection
        self.http_timeout, self.socket_timeout = config.http_timeout, config.socket_timeout
        self.dead_end = dead_end                        # a pipe whose other end is closed: ends poll() at a stop
        self.undrained = {}                             # at a stop: listener -> how many of its queue are to come yet
        self.drain_until = self.closing_at = math.inf   # until when; and from when on those that are silent are closed
        self.next_look = 0.0
        self.poll = select.epoll()
        for fd, listener in listeners.items():
            listener.socket.setblocking(False)
            self.poll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)      # wakes one process, not all
        self.one_shot = select.EPOLLONESHOT if config.threads > 1 else 0

    def events(self):
        """[(descriptor, event)], none if nothing comes for a second."""
        if self.undrained:
            if time.monotonic() > self.drain_until:
                self.undrained.clear()
            return [(fd, 0) for fd in list(self.undrained)]
        return self.poll.poll(1 if self.parked else None, 1 if self.one_shot else 64)   # to each thread one

    def park(self, connection, deadline, events=select.EPOLLIN):
        """Wait for more from the client, or another event of epoll(7), without a thread that waits."""
        if connection.deadline is None:
            os.set_blocking(connection.fd, False)
        connection.deadline = deadline
        self.parked[connection.fd] = connection         # first: the event may come to another thread at once
        if events != connection.events or self.one_shot:
            change = self.poll.modify if connection.events else self.poll.register
            connection.events = events
            try:
                change(connection.fd, events | self.one_shot)
            except OSError:
                if self.parked.get(connection.fd) is connection:
                    raise                               # else another thread has closed it already

    def keep(self, connection, now, events=select.EPOLLIN):
        """It has had its response, and waits for the next request. If that is here already, no event will tell of it:
        so we ask for room to write too, which there is at once. now: a time.monotonic()."""
        seconds = self.http_timeout
        if connection.data:
            connection.data = skip_empty_lines(connection.data)
        if connection.data:
            events |= select.EPOLLOUT
            if b'\r\n\r\n' not in connection.data:      # a head has begun
                seconds = self.socket_timeout
        self.park(connection, now + seconds, events)

    def take_back(self, connection, fd, ok):
        """The end of the job, in its thread. wait() has to wake up at once, to look at deadlines from now on."""
        self.keep(connection, time.monotonic(), select.EPOLLIN | select.EPOLLOUT) if ok else close_hard(fd)

    def stop(self, seconds):
        """No new connections but those that wait already, as the kernel may have told us alone of them; and those for
        so many seconds at the most (0: none)."""
        now = time.monotonic()
        self.closing_at, self.drain_until = now + 1, now + seconds
        for fd in self.listeners:
            with contextlib.suppress(OSError):
                self.poll.unregister(fd)
        # Counted only now: until here the kernel could tell us of one more.
        self.undrained = {fd: listener.waiting() for fd, listener in self.listeners.items()} if seconds else {}
        self.poll.register(self.dead_end, 0)

    def may_accept(self, fd):
        """At a stop: is there still one of those who waited then?"""
        left = self.undrained.pop(fd, 0)
        if left > 1:
            self.undrained[fd] = left - 1
        return left > 0

    def end_when_empty(self, jobs):
        """After stop(), when no event came. jobs: are there any that may give a connection back?"""
        if time.monotonic() > self.closing_at:          # who has begun a head may end it, and its event may yet come
            self.close(lambda one: not one.data and not ready_within(one.fd, select.POLLIN, 0))
        if self.closing_at < math.inf and not (self.parked or self.undrained or jobs):
            raise OSError(errno.ENOTSOCK, 'told to stop')               # as accept() does at a dead end

    def close_overdue(self):
        """Once a second: close those whose time is up."""
        now = time.monotonic()
        self.next_look = now + 1
        self.close(lambda connection: connection.deadline < now)

    def make_room(self):
        """Close a part of those that are silent the longest; False if there are none."""
        idle = sorted(connection.deadline for connection in list(self.parked.values()) if not connection.data)
        if idle:
            self.close(lambda connection: not connection.data and connection.deadline <= idle[len(idle) // 4])
        return bool(idle)

    def close(self, condition):
        """Close parked connections. Another thread may serve one, and park it again, or a new one with the same
        descriptor, at any moment: so each is claimed first, and then asked again."""
        for fd in [fd for fd, connection in list(self.parked.items()) if condition(connection)]:
            connection = self.parked.pop(fd, None)
            if connection is None:
                continue
            if not condition(connection):
                self.parked[fd] = connection
                if connection.events:                   # 0: who parks it now has still to register it
                    with contextlib.suppress(FileNotFoundError):        # or is just about to; an event that came
                        self.poll.modify(fd, connection.events | self.one_shot)         # meanwhile comes again
                continue
            if connection.data:
                with contextlib.suppress(OSError):
                    os.write(fd, b''.join(plain_answer('408 Request Timeout', 'the head took too long')))
            os.close(fd)


class Core:
    """What serves one request at a time: a worker with one thread has one, others one for each thread."""

    def __init__(self, worker, number):
        self.worker, self.config, self.row, self.kept = worker, worker.config, worker.rows[number], worker.kept
        self.response = Response(self.config)
        self.log = RequestLog(self.config, worker.request_log, worker.total, worker.number, number)
        self.ready, self.saw_any = [], False            # events that wait() has still to look at; did it see any?
        self.buffers = [self.row.packet]                # what preadv() wants
        self.accepts = 0
        self.trusted = self.config.trust_proxy
        self.late = 0.0                                 # until then clients may have given up waiting
        self.template = {
            'REQUEST_METHOD': 'GET', 'SCRIPT_NAME': '', 'PATH_INFO': '', 'QUERY_STRING': '', 'SERVER_NAME': 'localhost',
            'SERVER_PORT': '80', 'SERVER_PROTOCOL': 'HTTP/1.1', 'wsgi.version': (1, 0), 'wsgi.url_scheme': 'http',
            'wsgi.input': EmptyInput(), 'wsgi.errors': sys.stderr, 'wsgi.multithread': self.config.threads > 1,
            'wsgi.multiprocess': self.config.processes > 1, 'wsgi.run_once': False, 'wsgi.file_wrapper': FileWrapper,
            'wsgi.input_terminated': True, 'uwsgi.version': __version__.encode(),
            'uwsgi.node': os.uname().nodename.encode()}
        self.expected = Expected(self.template)
        self.templates = {fd: {**self.template, 'SERVER_NAME': listener.host, 'SERVER_PORT': listener.port,
                               'REMOTE_ADDR': '', 'REMOTE_PORT': ''} for fd, listener in worker.listeners.items()}

    def serve(self):
        """The hot path: request after request, until accept() fails because of a stop.

        What each request needs is a local variable; what is rare is in a method."""
        preadv, close, clock, nowait = os.preadv, os.close, time.monotonic, NOWAIT
        memory, buffers, numbers = self.row.memory, self.buffers, self.row.numbers
        response, application, expected = self.response, self.worker.application, self.expected
        start_response, logging, limit = response.start_response, self.worker.logging, self.worker.limit
        template, unknown, kept = self.template, {}, self.kept
        (listener, *_), accept = self.worker.listeners.values(), self.wait
        if not kept:
            accept = listener.socket._accept            # a bare descriptor, and no socket made of it: -1.4 us
        requests, running = int(numbers[REQUESTS]), numbers[RUNNING]
        start, start_end, started_environ, started_pieces, new_environ, all_pieces, planned = expected.plan
        while True:
            try:
                fd, connection = accept()               # connection: a Connection over HTTP, else the client's address
            except OSError as error:
                if self.worker.must_stop(error):
                    return
                continue
            response.fd = fd
            numbers[STARTED] = began = clock()
            response.sent = response.keep = response.chunked = response.head_only = False
            response.blocking = True
            response.status = job = body = None
            environ, response.http = unknown, ''
            variables = size = 0
            try:
                if began < self.late and ready_within(fd, 0, 0):        # it waited behind a slow one, and hung up
                    raise ClientGone(0, 'before its turn')
                if kept and type(connection) is Connection:
                    size = connection.end + 4
                    environ = self.read_request(connection)
                    if connection.length:
                        body = response.body = self.open_body(environ, connection.length, fd, connection.data)
                        if body is None:
                            connection.data = connection.data[connection.length:]
                else:
                    if not nowait:
                        os.set_blocking(fd, False)
                    try:
                        got = preadv(fd, buffers, -1, nowait)
                    except OSError:                     # nothing yet, or the client has gone: receive() will see
                        got = 0
                    modifier1 = memory[0]
                    end = memory[1] + (memory[2] << 8) + 4  # if got < 4 that of an earlier packet: no matter, it's >= 4
                    if got < end or modifier1:
                        got, end, modifier1 = self.receive(fd, got)
                    size = end - 4

                    # Now environ.update(unpack_vars(block)), guessed: see Expected, or go on at `job =`.
                    text = memory[:end].decode('latin-1')
                    simple = text[4:start_end] == start and not modifier1       # a GET without a query, as expected
                    if simple:
                        environ, pieces, at = started_environ(), started_pieces, start_end
                    else:
                        environ, pieces, at = new_environ(), all_pieces, 4
                    for raw, length, name in pieces:
                        middle = at + length
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
                        (start, start_end, started_environ, started_pieces, new_environ, all_pieces,
                         planned) = expected.plan
                    if not simple:
                        response.head_only = environ['REQUEST_METHOD'] == 'HEAD'
                        if modifier1 == WSGI_STRIP:
                            strip_script_name(environ)
                        if environ.get('CONTENT_LENGTH'):
                            body = self.open_body(environ, content_length(environ['CONTENT_LENGTH']), fd,
                                                  memory[end:got])

                job = response.finish(application(environ, start_response))
            except BaseException as error:
                self.failed(error)
            numbers[STARTED] = 0.0                      # harakiri isn't for what follows; it is for write() above
            ended = clock()
            all_done = job is None and body is None and not response.ending
            if all_done and response.keep:
                kept.keep(connection, ended)
            elif all_done and not (response.http and connection.data):
                close(fd)
            else:
                self.let_go(fd, job, body, connection)
            took = ended - began
            if took > 0.1:                              # others have waited meanwhile: are they still there?
                self.late = ended + 10 * took           # so long it may take until all of them had their turn
            requests += 1
            running += took
            numbers[REQUESTS], numbers[RUNNING] = requests, running
            if logging and (size or response.status != '499'):          # else somebody only looked whether we are there
                self.log.add(environ, response, requests, variables or max(0, len(environ) - len(template)), size,
                             ended, took)
            if requests >= limit:
                limit = self.worker.check_limits()

    # -- what is rare

    def receive(self, fd, got):
        """The head didn't come at once, or isn't for WSGI: read on. (bytes read, end of the packet, modifier1)."""
        packet, deadline = self.row.packet, time.monotonic() + self.config.socket_timeout
        self.row.numbers[STARTED] = -1.0                # socket-timeout holds for the head, and not harakiri
        while got < 4:
            try:
                got += read_some(fd, packet[got:], deadline)
            except ClientGone as error:
                error.errno = error.errno if got else 0         # a connection that was only tried is no error
                raise
        if packet[0] == PING:
            with contextlib.suppress(OSError):          # it may not wait for it
                os.write(fd, PONG)
            raise ClientGone(0, 'a ping')
        if packet[0] not in (WSGI, WSGI_STRIP) and not (packet[0] == CGI and self.config.cgi):
            if bytes(packet[:3]).isalpha():
                raise BadRequest('this socket speaks the uwsgi protocol, and this is HTTP: in nginx use uwsgi_pass, '
                                 'not proxy_pass; for a browser use the option http-socket')
            raise BadRequest(f'modifier1 is {packet[0]}: only WSGI (0) is served here')
        end = packet[1] + (packet[2] << 8) + 4
        while got < end:
            got += read_some(fd, packet[got:], deadline)
        self.row.numbers[STARTED] = time.monotonic()
        return got, end, packet[0]

    def open_body(self, environ, length, fd, begun):
        """Set wsgi.input; the Body, which knows what wasn't read, unless all of it is here. length: -1 is chunked."""
        limit = self.config.limit_post or math.inf
        if length > limit:
            raise BadRequest(f'the body has {length} bytes, limit-post allows {limit}', '413 Content Too Large')
        if 0 <= length <= len(begun):
            environ['wsgi.input'] = io.BytesIO(begun[:length])
            return None
        body = Body(fd, begun, length, self.config.socket_timeout, limit, self.lend)
        if self.response.http == 'HTTP/1.1' and not begun:
            body.wants_continue = environ.get('HTTP_EXPECT', '').lower() == '100-continue'
        environ['wsgi.input'] = io.BufferedReader(body, READ_MAX)
        return body

    def lend(self, seconds):
        """Time that the client takes doesn't count for harakiri."""
        self.row.numbers[STARTED] += seconds

    def failed(self, error):
        """The one place where the exceptions of a request end."""
        self.row.numbers[STARTED] = 0.0                 # harakiri must not break this off too
        self.worker.guard.end_child('its request', error)
        response, request = self.response, self.row.request()
        response.keep, status, why = False, '500 Internal Server Error', ''
        if isinstance(error, ClientGone):
            response.status, response.ending = '499', 'cut' if response.sent else ''
            if error.errno:
                log_now_and_then(error.strerror, f'{request}: {error.strerror}')
            return
        self.row.numbers[ERRORS] += 1
        if isinstance(error, BadRequest):
            status, why, response.ending = error.status, str(error), 'drain'
            log_now_and_then(why[:12], f'bad request: {why}')           # causes differ in their first words
        else:
            log_exception(f'{request}: the application failed')
        if isinstance(error, Harakiri):
            status = '504 Gateway Timeout'
        elif isinstance(error, (SystemExit, KeyboardInterrupt)):
            self.worker.leave('the application called sys.exit()')
        if response.sent:
            response.cut('the response was begun')
            return
        head, body = plain_answer(status, why, server_headers(time.time()) if response.http else b'')
        response.status, response.sent = status, True
        response.head, response.headers, response.size = head, 3, len(body)
        with contextlib.suppress(OSError):
            os.write(response.fd, head if response.head_only else head + body)

    def let_go(self, fd, job, body, connection):
        """The end of a connection, or of its turn, that needs more than close()."""
        response, ending, done = self.response, self.response.ending, close_after
        response.ending = ''
        if body is not None:
            body.pieces = iter(())                      # later reads get nothing, and a cycle of references ends
            if response.http:
                connection.data = bytes(body.begun)     # what came behind it: the next requests
        if response.keep:
            done = functools.partial(self.kept.take_back, connection)
        elif response.http and connection.data:         # further requests, which nobody will read
            ending = ending or 'drain'
        if ending == 'cut':
            done = close_hard
        elif ending == 'drain' or body is not None and body.left:
            done = close_after
            try:
                job = run_a_while(fd, then_drain(fd, job or ()))
            except OSError:                             # it has gone
                return close_hard(fd)
        if job is None:
            return done(fd, True)
        if response.http and connection.events:         # it belongs to the job now
            connection.events = 0
            self.kept.poll.unregister(fd)
        return self.worker.next_offloader().take(fd, job, done)

    # -- several listeners, HTTP, threads; and a stop

    def wait(self):
        """Stands in for accept(): (descriptor, address) of the next connection that speaks uwsgi, or (descriptor,
        Connection) of one that has sent the head of a request over HTTP."""
        kept = self.kept
        while True:
            while self.ready:
                fd, _ = event = self.ready.pop(0)       # the first: who is new should not wait behind a later request
                connection = kept.parked.pop(fd, None)
                if connection is None:
                    listener = kept.listeners.get(fd)
                    if listener is None:
                        if fd == kept.dead_end:         # the event never ends, and wakes all threads
                            time.sleep(0.01)
                        continue
                    draining = self.worker.stopping
                    if draining and not kept.may_accept(fd):
                        continue
                    self.saw_any = True
                    try:
                        new, address = listener.socket._accept()
                    except OSError as error:
                        if draining:                    # if not, a stop may just have counted one who has come since
                            kept.undrained.pop(fd, None)
                        elif error.errno != errno.EAGAIN:       # that is: another worker was faster
                            raise
                        continue
                    self.accepts += 1
                    if self.accepts % 16:               # another one may wait: try without epoll_wait(), -1 us; but
                        self.ready.append(event)        # now and then it has to tell of the kept connections
                    if listener.protocol == 'uwsgi':
                        return new, address
                    connection = Connection(new, self.templates[fd], address)
                    if not NOWAIT:
                        os.set_blocking(new, False)
                self.saw_any = True
                if self.read_head(connection):
                    return connection.fd, connection
            if self.worker.stopping and not self.saw_any:
                kept.end_when_empty(self.worker.has_jobs())
            if time.monotonic() >= kept.next_look:
                kept.close_overdue()
            self.saw_any, self.ready = False, kept.events()

    def read_head(self, connection):
        """Take what came. Is a head whole, or hopeless? If not, the connection is parked, or closed."""
        data, new, begun = connection.data, b'', bool(connection.data)
        if not begun or data.find(b'\r\n\r\n') < 0:
            try:
                new = self.row.memory[:os.preadv(connection.fd, self.buffers, -1, NOWAIT)]
            except BlockingIOError:
                self.kept.park(connection, connection.deadline or time.monotonic() + self.config.http_timeout)
                return False
            except OSError:
                pass
            if not new:
                os.close(connection.fd)                 # epoll forgets it too
                return False
            data += new
        if data[0] == 13:                               # CR
            data = skip_empty_lines(data)
        connection.data, connection.end = data, data.find(b'\r\n\r\n')
        if connection.end < 0 and not hopeless(data):   # from its first byte on a head has socket-timeout in all
            seconds = self.config.socket_timeout if data else self.config.http_timeout
            self.kept.park(connection, connection.deadline if begun else time.monotonic() + seconds)
            return False
        if data is not new:                             # else the row shows it already
            self.row.memory[:512] = data[:512].ljust(512)
        return True

    def read_request(self, connection):
        """The environ of the request whose head is there; prepares the response."""
        response, data, end = self.response, connection.data, connection.end
        response.http, response.body, response.blocking = 'HTTP/1.1', None, connection.deadline is None
        response.head_only = data[:5] == b'HEAD '
        line_end = data.find(b'\r\n')
        start_end = line_end - 9                        # where ' HTTP/1.1' begins
        fields = data[start_end:end + 2]
        if fields != connection.fields or line_end > LINE_MAX or end > HEAD_MAX:
            if not (9 < line_end <= LINE_MAX and 0 <= end <= HEAD_MAX):
                raise BadRequest(*hopeless(data[:end + 4] if end >= 0 else data) or (NO_FIRST_LINE,))
            environ = connection.learn(fields)
        else:
            environ = connection.new_environ()
        parse_start(data[:start_end], environ)
        response.http = environ['SERVER_PROTOCOL']
        response.keep = connection.keep and not self.worker.stopping
        connection.data = data[end + 4:]
        if self.trusted:
            client_address(environ, self.trusted)
        return environ


# ---------------------------------------------------------------------------------------------
# 11. Worker
#
# A worker is a process that serves. Its cores share its listeners, offload threads and kept connections; the master
# speaks to it by signals, and it answers in the first of its rows of the scoreboard.
#
# A stop must neither lose a connection nor wait for one. So the handler of the signal puts a dead end, a pipe whose
# other end is closed, in the place of the listening descriptor (dup2): Python tries the interrupted accept() again
# (PEP 475), and it fails; a connection that came before is served. Core.wait() finds the dead end in its epoll, and
# KeptConnections.end_when_empty() ends it. If all workers end (SIGTERM), those who are in the queue by then are served
# too, by Core.wait(), whatever took them before; they are counted, as others may come for ever.
#
# A signal between Python's check and the system call goes unnoticed until the next connection, which is why the master
# repeats it. (SIGIO, by which the kernel tells of the master's death, comes once: a worker that misses it serves one
# more request.)

STOP_SIGNALS = signal.SIGTERM, signal.SIGHUP, signal.SIGIO      # for a worker
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD


def local_name(fd):
    """What a listener has in common with all that it accepts: family, type, path or port. None for no socket."""
    with contextlib.suppress(OSError), borrowed(fd) as one:
        name = one.getsockname()
        return one.family, one.type, name[1:2] if type(name) is tuple else name


class ForkGuard:
    """What a fork() in this process means, from now on. What the application forks is no server, and no worker: our
    signals aren't for it, no client waits for it, and it must hold no socket for longer than we do. A new worker sees
    to all this itself. Signals are blocked meanwhile, since they would find it half done."""

    def __init__(self, signals, descriptors):
        self.signals, self.descriptors, self.pid = signals, descriptors, os.getpid()
        self.active, self.is_worker = True, False       # is_worker: will the next child be one?
        self.dead_end, other_end = os.pipe()            # stands in for what a process should use no more
        os.close(other_end)
        os.register_at_fork(before=self.before, after_in_parent=self.in_parent, after_in_child=self.in_child)

    def before(self):
        if self.active:
            signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)

    def in_parent(self):
        if self.active:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)

    def in_child(self):
        if self.active and not self.is_worker:
            for fd in self.descriptors():
                os.dup2(self.dead_end, fd, inheritable=False)
            signal.set_wakeup_fd(-1)
            for number in self.signals:                 # they end a process again (multiprocessing's terminate())
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        self.active = False                             # its own forks are its own business

    def end_child(self, where, error=None):
        """End what the application forked and what came back to us from there, instead of ending itself."""
        if os.getpid() != self.pid:                     # not `active`: who forks in C tells no hook
            if not isinstance(error, SystemExit):
                log(f'a process that the application forked came back from {where}, and is ended'
                    + ('' if error is None else f': {error!r}') + '; it should call os._exit(), or be made by '
                    'subprocess')
            flush_streams()
            os._exit(1)


def times_of_modules():
    """{name: when its file was changed} of all modules."""
    return {name: mtime(file) for name, module in list(sys.modules.items())
            if (file := getattr(module, '__file__', None))}


class Worker:
    """A process that serves: its cores, and what they share."""

    def __init__(self, config, listeners, application, rows, total, number, master_pid):
        self.config, self.application, self.rows, self.total = config, application, rows, total
        self.number, self.master_pid = number, master_pid       # or None without a master
        self.name = f'worker {number} (pid {os.getpid()})'
        self.listeners = {listener.socket.fileno(): listener for listener in listeners}
        self.names = {local_name(fd) for fd in self.listeners}          # now: a stop takes them away
        self.cores, self.guard = [], ForkGuard(STOP_SIGNALS, self.descriptors)
        blocking = len(listeners) == config.threads == 1 and listeners[0].protocol == 'uwsgi'   # so accept() does
        self.kept = None if blocking else KeptConnections(self.listeners, config, self.guard.dead_end)
        self.stopping = False
        self.offloaders = [Offloader() for _ in range(max(1, config.offload_threads))]
        self.next_offloader = itertools.cycle(self.offloaders).__next__
        self.alarm_for = -1.0                           # how many requests were answered when set_alarm() was called
        self.logging = not config.disable_logging or any((
            config.log_4xx, config.log_5xx, config.log_slow, config.log_zero, config.log_big))
        self.request_log = main_log
        try:
            for path in config.req_logger[-1:]:         # the last, if there is one
                self.request_log = Log(open_to_append(path), path)
        except ConfigError as error:                    # it was moved away, and a new one isn't ours to make
            log(f'req-logger: {error}; the lines go to the other log')
        # After so many requests we leave, but not all workers at the same time.
        delta = config.max_requests_delta * (number - 1) or config.max_requests * (os.getpid() % 11) // 100
        self.most = config.max_requests + delta if config.max_requests else math.inf
        each_time = config.reload_on_rss or config.reload_on_as or config.max_requests and config.threads > 1
        self.limit = 0 if each_time else self.most      # so many of a core, and it asks check_limits()

    def has_jobs(self):
        """Is there a job that may still give a connection back?"""
        return any(one.inbox or one.jobs or one.ending for one in self.offloaders)      # in the order that a job takes

    def run(self):
        """Serve until told to stop."""
        cores = self.cores = [Core(self, i) for i in range(self.config.threads)]
        for offloader in self.offloaders if len(cores) > 1 else ():
            offloader.start()                           # here: two threads with a first job would start two
        threads = [start_thread(core.serve) for core in cores[1:]]
        if self.config.py_autoreload and self.number == 1 and self.master_pid:
            start_thread(self.watch_modules, times_of_modules(), name='py-autoreload')
        self.tell_master(READY)
        cores[0].serve()
        if cores[0].kept is not self.kept:              # it was told to stop in accept(): see on_stop()
            cores[0].kept = self.kept
            cores[0].serve()
        for thread in threads:
            thread.join()
        for offloader in self.offloaders:
            offloader.finish()

    def handle_signals(self):
        """The handlers of a worker; once more after the application may have set its own. INT comes from a terminal
        to the whole group, and the master decides: nothing is done. QUIT kills."""
        import faulthandler
        handlers = {**dict.fromkeys(SIGNALS, lambda *_: None), **dict.fromkeys(STOP_SIGNALS, self.on_stop),
                    signal.SIGQUIT: signal.SIG_DFL, signal.SIGUSR1: follow_logs, signal.SIGUSR2: self.tell_state,
                    signal.SIGPIPE: signal.SIG_IGN}
        if self.config.harakiri or signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, self.on_harakiri):
            handlers[signal.SIGALRM] = self.on_harakiri         # else the application has its own, and no use for ours
        for number, handler in handlers.items():
            faulthandler.unregister(number)             # of an earlier call
            signal.signal(number, handler)
        for number in handlers.keys() & {signal.SIGUSR2, signal.SIGALRM} if len(self.rows) == 1 else ():
            # The stack comes first, and even if Python hangs in C. Running threads can make it crash: dump_threads().
            faulthandler.register(number, file=2, all_threads=False, chain=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def watch_modules(self, before):
        """py-autoreload, in a thread of the first worker: ask for a reload when a module's file changes."""
        while True:
            time.sleep(self.config.py_autoreload)
            now = times_of_modules()
            if any(before.get(name, changed) != changed for name, changed in now.items()):
                os.kill(self.master_pid, signal.SIGHUP)
            before = now

    def dump_threads(self):
        """Log the stacks of all threads if there are several: here they can't change, since that takes the GIL."""
        if len(self.rows) > 1:
            import faulthandler
            with contextlib.suppress(OSError), open(os.memfd_create('stacks'), 'rb', buffering=0) as file:
                faulthandler.dump_traceback(file)       # not to the log itself, which may be stuck
                log(os.pread(file.fileno(), 1 << 20, 0).decode('utf-8', 'backslashreplace'))

    def tell_state(self, *_):
        self.dump_threads()
        log(f'{self.name}: ' + (', '.join(row.request() for row in self.rows if row.numbers[STARTED] > 0) or 'idle'))

    def on_harakiri(self, *_):
        """The request takes too long. With one thread it is broken off, and the worker is replaced: after an exception
        at an arbitrary place its state can't be trusted. With several, none can be broken off: what doesn't end
        within harakiri-graceful-timeout is killed by the master, with all threads."""
        self.dump_threads()
        row, now, limit = self.rows[0], time.monotonic(), self.config.harakiri
        started, answered = row.numbers[STARTED], row.numbers[REQUESTS]
        if len(self.rows) > 1:
            self.leave('harakiri, its stacks are above')
        elif started > 0 and (answered == self.alarm_for or limit and now >= started + limit):     # else it's too late
            log(f'harakiri: {self.name} at {row.request()} for {(now - started) * 1000:.0f} ms, '
                'its Python stack is above')
            self.leave('harakiri')
            raise Harakiri

    def set_alarm(self, seconds):
        """uwsgi.set_user_harakiri(): a limit for the request at hand, 0 takes it back."""
        self.alarm_for = self.rows[0].numbers[REQUESTS]
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def on_stop(self, number, _):
        """SIGTERM: everything ends, serve what waits. SIGHUP: others can serve it. SIGIO: the master has died."""
        if number == signal.SIGIO:                      # nobody is left who would end us when it takes too long
            import faulthandler
            faulthandler.unregister(signal.SIGALRM)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, self.config.worker_reload_mercy)
        if self.stopping:                               # the master repeats it, to interrupt accept()
            return
        self.stopping = self.rows[0].numbers[LEAVING] = self.rows[0].numbers[HEARD] = True
        blocking, descriptors = not self.kept, list(self.listeners)
        if blocking and number == signal.SIGTERM:       # Core.wait() is to serve the queue, over a copy of the socket:
            (listener,) = self.listeners.values()       # the descriptor that accept() uses becomes a dead end
            with contextlib.suppress(OSError):          # there may be no descriptor left for it
                self.in_accept = listener.socket        # so that it isn't closed
                listener.socket = self.in_accept.dup()
                self.listeners[listener.socket.fileno()] = listener
                # This makes it non-blocking, for all that share it: they stop too, or see must_stop().
                self.kept = KeptConnections({listener.socket.fileno(): listener}, self.config, self.guard.dead_end)
        if self.kept:
            self.kept.stop({signal.SIGTERM: math.inf, signal.SIGHUP: 1}.get(number, 0))
        if blocking or number == signal.SIGIO:          # the next master must be able to bind
            for fd in descriptors:
                os.dup2(self.guard.dead_end, fd, inheritable=False)

    def descriptors(self):
        """Listeners and clients, which a child must let go of. A thread may just have accepted one, and not said so."""
        try:
            there = map(int, os.listdir('/proc/self/fd'))
        except OSError:                                 # no descriptor is left to look with
            there = range(3, min(os.sysconf('SC_OPEN_MAX'), 65536))
        return [fd for fd in there if local_name(fd) in self.names]

    def must_stop(self, error):
        """After a failed accept(): is it because of a stop? Otherwise wait until it may go better."""
        self.guard.end_child('its request', error)
        if error.errno == errno.EINVAL:                 # the master has ended it: a stop is on its way, or just came
            time.sleep(0.01)
            return False
        if self.stopping:
            return True
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            log_now_and_then('accept', f'worker {self.number}: accept: {error.strerror}')
            if not (self.kept and self.kept.make_room()):
                if error.errno == errno.EMFILE and not (self.kept and self.kept.parked or self.has_jobs()):
                    self.leave('the application holds all descriptors')
                time.sleep(0.1)
        elif error.errno == errno.EAGAIN:               # a worker with epoll, or one that stopped, made it non-blocking
            select.select(list(self.listeners), [], [])
        elif error.errno != errno.ECONNABORTED:
            log(f'worker {self.number}: accept: {error.strerror}; did the application close the socket?')
            return True
        return False

    def tell_master(self, what):
        """Set a number in the first row, and wake the master, which looks at all of them."""
        self.rows[0].numbers[what] = 1
        if self.master_pid:
            os.kill(self.master_pid, signal.SIGCHLD)

    def leave(self, why):
        """Ask to be replaced; goes on serving until then."""
        if not self.rows[0].numbers[LEAVING]:
            log(f'{self.name} leaves: {why}')
            self.tell_master(LEAVING)
            if not self.master_pid:
                self.on_stop(signal.SIGTERM, None)

    def check_limits(self):
        """Between requests: is it time for a successor? From which number of requests on to look again."""
        config, answered = self.config, sum(int(row.numbers[REQUESTS]) for row in self.rows)
        if answered >= self.most:
            self.leave(f'max-requests, it has answered {answered}')
        elif config.reload_on_rss or config.reload_on_as:
            for name, most, size in zip(('as', 'rss'), (config.reload_on_as, config.reload_on_rss), memory_of()):
                if most and size >> 20 >= most:
                    self.leave(f'reload-on-{name} = {most}, it has {size >> 20} MB after {self.rows[0].request()}')
        return math.inf if self.rows[0].numbers[LEAVING] else self.limit


# ---------------------------------------------------------------------------------------------
# 12. Loading the application
#
# The application is loaded once, in the master before the fork: the workers share its memory, and a mistake in it shows
# before anybody is served. What can't be found is told with where it was looked for.

EXIT_CONFIG = 1                         # a mistake in the configuration, an address that can't be bound
EXIT_NO_APP = 22                        # the application can't be loaded; uWSGI's number


def check_command(command, config):
    """Is the program there? For --check, and so before a reload: does it load its application?"""
    import shutil
    import subprocess
    if shutil.which(command[0]) is None:
        raise ConfigError(f'there is no program {command[0]}')
    if config.check and (config.rack or config.psgi):
        language, option, program, file = command
        if subprocess.call([language, option, ''.join(program.splitlines(True)[:3]), file]):    # up to its `app =`
            raise ConfigError(f'{file} failed to load')
    return command


def import_module(name):
    import importlib
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.split('.')[0] == error.name.split('.')[0]:
            raise ConfigError(f'there is no module {error.name!r} in {sys.path[:3]} … (working directory '
                              f'{os.getcwd()}, Python {sys.executable}); see chdir, pythonpath, virtualenv') from None
        raise


def import_file(name):
    from importlib import machinery, util
    file = os.path.abspath(name)
    if not os.path.isfile(file):
        raise ConfigError(f'there is no file {file}')
    stem = os.path.splitext(name)[0]                    # with its directory: wsgi.py is a common name
    loader = machinery.SourceFileLoader('wsgi_file_' + ''.join(c if c.isalnum() else '_' for c in stem), file)
    module = sys.modules[loader.name] = util.module_from_spec(util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def find_callable(module, attribute, where):
    """The application in a module: name, a.b, or factory()."""
    name = attribute.removesuffix('()')
    try:
        found = functools.reduce(getattr, name.split('.'), module)
    except AttributeError:
        there = [n for n in ('application', 'app', 'create_app') if callable(getattr(module, n, None))]
        hint = f'; it has {there[0]!r}: write {where}:{there[0]}' if there else ''
        raise ConfigError(f'{where} has no {name!r}{hint}') from None
    found = found() if name != attribute else found
    if not callable(found):
        raise ConfigError(f'{where}: {name!r} is {found!r}, and no WSGI application')
    return found


def load(spec, attribute, is_file=None):
    """The application of a module or a file, `spec` or `spec:attribute`. is_file: None where its name must tell."""
    name, its_own = spec.rsplit(':', 1) if ':' in spec and not os.path.isfile(spec) else (spec, '')
    if is_file is None:                                 # project.wsgi is Django's module
        is_file = name.endswith('.py') or name.endswith('.wsgi') and ('/' in name or os.path.isfile(name))
    if not is_file and (not name or '/' in name or name.endswith('.py')):
        raise ConfigError(f'{spec!r} is no module; for a file: wsgi-file = FILE')
    return find_callable((import_file if is_file else import_module)(name), its_own or attribute, name)


def mounted(mounts, manage, fallback):
    """A WSGI application that passes a request on to the one mounted at its SCRIPT_NAME, or at '', or to fallback."""
    prefixes = sorted(mounts, key=len, reverse=True)

    def application(environ, start_response):
        script, path = environ['SCRIPT_NAME'].rstrip('/'), environ['PATH_INFO']
        prefix = next((prefix for prefix in prefixes if f'{path}/'.startswith(prefix + '/')), '')
        if manage and prefix:
            script = environ['SCRIPT_NAME'] = prefix
            environ['PATH_INFO'] = path[len(prefix):]
        found = mounts.get(script, mounts.get('', fallback))
        if found is None:
            return in_words(start_response, '404 Not Found', 'no application is mounted here')
        return found(environ, start_response)
    return application


def change_directory(config, option):
    """chdir, chdir2."""
    directory = getattr(config, option)
    try:
        if directory:
            os.chdir(directory)
    except OSError as error:
        raise ConfigError(f'{config.where(directory, option)}{option} = {directory}: {error.strerror}') from None


def load_application(config):
    """The WSGI application that the options name, with its mounts; or the command that workers become."""
    if command := worker_command(config):
        return check_command(command, config)
    for name in getattr(config, 'import'):
        with config.errors_at(name, 'import'):
            import_module(name)
    mounts, application = {}, None
    for mount in config.mount:
        prefix, _, spec = map(str.strip, mount.partition('='))
        with config.errors_at(mount, 'mount'):
            mounts[prefix.rstrip('/')] = load(spec, config.callable)
    for name, spec in ('module', config.module), ('wsgi-file', config.wsgi_file):
        try:
            if spec and application is None:
                with config.errors_at(spec, name):
                    application = load(spec, config.callable, name == 'wsgi-file')
        except ConfigError as error:
            if name == 'wsgi-file' or not config.wsgi_file:
                raise
            log(f'{error}; wsgi-file takes its place')
    if config.cgi:
        application = cgi_application(config, application)
    if mounts:
        if application is None and not config.manage_script_name:
            application = next(iter(mounts.values()))   # as in uWSGI
        application = mounted(mounts, config.manage_script_name, application)
    if not hasattr(select, 'epoll'):
        raise ConfigError('the application has changed the modules of Python, by monkey.patch_all() of gevent or '
                          'eventlet: that runs in their own servers alone; leave it out, and set threads = N')
    if application is None:
        raise ConfigError('no application is named: set module = package.module:callable or wsgi-file = FILE')
    change_directory(config, 'chdir2')
    return with_static_files(config, application)


def load_or_log(config):
    """The application, or None after what is wrong was logged."""
    try:
        return load_application(config)
    except ConfigError as error:
        log(f'minuwsgi: {error}')
    except (Exception, SystemExit):
        log_exception('minuwsgi: the application failed to load')


def look_before_fork():
    """Warn of what an application did while it was loaded and that doesn't survive, or bear, a fork."""
    done, threading = [], sys.modules.get('threading')
    for thread in threading.enumerate() if threading else ():
        if thread is not threading.main_thread():
            done.append(f'started the thread {thread.name!r}, which the workers do not have')
    for fd in range(3, 256):
        with contextlib.suppress(OSError):              # there is no such descriptor, or it isn't connected
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with borrowed(fd) as connection:
                    done.append(f'opened a connection to {connection.getpeername()}, which all workers would share')
    for what in done:
        log(f'warning: while it was loaded, the application {what}: do it in each worker '
            '(os.register_at_fork(after_in_child=...)), or set lazy-apps = true')


# ---------------------------------------------------------------------------------------------
# 13. Statistics
#
# The rows of the scoreboard tell what each worker does. From them, and the kernel's numbers, the master answers (so it
# does when all workers are busy, too), and each worker answers its application. The names are uWSGI's, for tools that
# know it. No variables of requests are in it.

def state_of(rows):
    """The state of a worker; rows: one for each of its cores."""
    first = rows[0].numbers
    requests, errors, running = (sum(row.numbers[what] for row in rows) for what in (REQUESTS, ERRORS, RUNNING))
    counts = {'requests': int(requests), 'exceptions': int(errors)}
    serving = sum(row.numbers[STARTED] > 0 for row in rows)
    vsz, rss = memory_of(int(first[PID]))
    return {'id': int(first[NUMBER]), 'pid': int(first[PID]), **counts, 'delta_requests': int(requests),
            'accepting': int(0 < first[READY] <= time.monotonic() and not first[LEAVING]),
            'status': 'busy' if serving else 'idle', 'serving': serving, 'vsz': vsz, 'rss': rss,
            'running_time': int(running * 1e6), 'avg_rt': int(running * 1e6 / max(1, requests)),
            'signals': 0, 'signal_queue': 0, 'tx': 0,
            'apps': [{'id': 0, 'modifier1': 0, 'mountpoint': '', 'startup_time': 0, 'chdir': '', **counts}],
            'cores': [{'id': i, 'requests': int(row.numbers[REQUESTS]), 'in_request': int(row.numbers[STARTED] > 0),
                       'static_requests': 0, 'routed_requests': 0, 'offloaded_requests': 0, 'write_errors': 0,
                       'read_errors': 0, 'vars': [], 'req_info': {}} for i, row in enumerate(rows)]}


class Stats:
    """The state of the server for uwsgitop and others: one JSON document for each connection, or with
    stats-http GET / (JSON), /metrics (Prometheus) and /health."""

    def __init__(self, master):
        self.master, self.directory = master, os.getcwd()       # which may be removed while we run
        self.sockets = {one.socket.fileno(): one.socket for one in master.owned if one.protocol == 'stats'}
        self.listening = set(self.sockets)              # the others are clients that are to ask over HTTP

    def answer(self, fd):
        """Something can be read from one of our sockets."""
        try:
            if fd in self.listening:
                client, _ = self.sockets[fd].accept()
                if self.master.config.stats_http:
                    self.sockets[client.fileno()] = client
                    if len(self.sockets) > 64:          # silent ones make way
                        self.sockets.pop(list(self.sockets)[1]).close()
                    return
                answer = self.json()
            else:
                client = self.sockets.pop(fd, None)
                if client is None:                      # it has just made way
                    return
                answer = self.over_http(client.recv(4096).split(b' ')[1:2])
            with client:
                client.settimeout(0.5)                  # a slow one must not hold the master
                client.sendall(answer)
        except OSError:
            time.sleep(0.01)                            # perhaps no descriptor is left, and it stays readable

    def over_http(self, path):
        status, kind, body = '200 OK', 'text/plain; version=0.0.4', b'ok\n'
        if path == [b'/metrics']:
            body = self.metrics()
        elif path != [b'/health']:
            kind, body = 'application/json', self.json()
        elif self.is_stuck():
            status, body = '503 Service Unavailable', b'all workers are busy, for a long time\n'
        return (f'HTTP/1.0 {status}\r\nConnection: close\r\nAccess-Control-Allow-Origin: *\r\n'
                f'Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n').encode() + body

    def is_stuck(self):
        """Is there no worker with a core that is idle, or got its request not long ago?"""
        long_ago = time.monotonic() - (self.master.config.harakiri or 30)
        ready = [child.rows for child in self.master.children.values() if child.rows[0].numbers[READY]]
        return all(0 < row.numbers[STARTED] < long_ago for rows in ready for row in rows)

    def workers(self):
        """What state_of() tells of each, and what only the master knows."""
        master, start = self.master, time.time() - time.monotonic()
        for child in sorted(master.children.values(), key=lambda child: (child.number, child.born)):
            yield {**state_of(child.rows), 'last_spawn': int(start + child.born),
                   'respawn_count': master.spawned[child.number], 'deaths': master.deaths[child.number],
                   'harakiri_count': master.harakiris[child.number]}

    def json(self):
        import json
        queues = [(listener, *listener.queue()) for listener in self.master.listeners]
        waiting = sum(waiting for _, waiting, _ in queues)
        return json.dumps({
            'version': __version__, 'pid': os.getpid(), 'uid': os.getuid(), 'gid': os.getgid(), 'cwd': self.directory,
            'listen_queue': waiting, 'load': waiting, 'listen_queue_errors': 0, 'signal_queue': 0, 'locks': [],
            'sockets': [{'name': listener.name, 'proto': listener.protocol, 'queue': waiting, 'max_queue': most,
                         'shared': 0, 'can_offload': 1} for listener, waiting, most in queues],
            'workers': list(self.workers())}, indent='\t').encode()

    def metrics(self):
        workers = {worker['id']: worker for worker in self.workers()}           # during a reload the new ones
        lines = ['# TYPE minuwsgi_listen_queue gauge']
        lines += [f'minuwsgi_listen_queue{{socket="{one.name}"}} {one.queue()[0]}' for one in self.master.listeners]
        for name, kind, key in (('requests_total', 'counter', 'requests'), ('errors_total', 'counter', 'exceptions'),
                                ('deaths_total', 'counter', 'deaths'), ('harakiris_total', 'counter', 'harakiri_count'),
                                ('rss_bytes', 'gauge', 'rss'), ('busy', 'gauge', 'serving')):
            lines.append(f'# TYPE minuwsgi_worker_{name} {kind}')
            lines += [f'minuwsgi_worker_{name}{{worker="{i}"}} {worker[key]}' for i, worker in workers.items()]
        return '\n'.join([*lines, '']).encode(errors='backslashreplace')


def offer_uwsgi_module(config):
    """`import uwsgi` and `from uwsgidecorators import postfork`, for applications that have them in their
    code: the part of uWSGI's Python module that makes sense here. Each worker enters itself as uwsgi.worker,
    and calls the functions in uwsgi.hooks."""
    import types
    module, decorators, master = types.ModuleType('uwsgi'), types.ModuleType('uwsgidecorators'), os.getpid()

    def workers():
        all_rows = module.worker.all_rows if module.worker else ()      # not yet
        found = [state_of(rows) for rows in all_rows if rows[0].numbers[PID]]
        return tuple({**worker, 'status': worker['status'].encode()} for worker in found)
    vars(module).update({
        'worker': None, 'hooks': [], 'workers': workers, 'numproc': config.processes,
        'version': __version__.encode(), 'version_info': tuple(map(int, __version__.split('.'))),
        'opt': {setting.name: os.fsencode(setting.value) for setting in config.settings},
        'masterpid': lambda: master if config.master else 0, 'mule_id': lambda: 0,
        'worker_id': lambda: module.worker.number if module.worker else 0,
        'set_user_harakiri': lambda seconds: module.worker.set_alarm(seconds),
        'reload': lambda: os.kill(master, signal.SIGHUP) or True,
        'stop': lambda: os.kill(master, signal.SIGTERM) or True, 'log': lambda message: log(message) or True})
    decorators.postfork = lambda function: module.hooks.append(function) or function
    sys.modules.update(uwsgi=module, uwsgidecorators=decorators)
    return module


# ---------------------------------------------------------------------------------------------
# 14. Master
#
# The master owns the sockets, loads the application, forks workers and waits. Each signal becomes a byte in a pipe
# (signal.set_wakeup_fd()). One loop sleeps on that pipe and its next deadline, and then converges: whatever happened,
# it compares what is with what should be, and mends the difference. So a signal that comes twice, or two that merge, do
# no harm. No timer is kept: each turn asks due(when) for all that has its time, and what isn't due yet says when the
# next turn comes.
#
# Each worker has the read end of a lifeline, a pipe whose write end only the master holds. With O_ASYNC the kernel
# sends SIGIO when that end closes: when the master dies, however it dies.
#
# A reload never takes a working site down. A child loads the new configuration and application as a proof; if that
# fails, nothing else happens. Then the master executes itself anew with the same pid. It inherits the sockets and the
# old workers, which go on serving, and replaces them one by one. Should the new image fail to load all the same, the
# old workers go on too; none is replaced until a reload works.

class Stopped(BaseException):
    """A signal that ends the server came while it was still starting."""


def catch_signals(pipe, starting=False):
    """Let each signal become a byte in the pipe. Called again when the application is loaded, which may have
    changed all this (asyncio does)."""
    def handler(number, _):
        if starting and number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            catch_signals(pipe)                         # a second one must not break off the end
            raise Stopped
    signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())      # they are blocked over the exec of a reload


def oom_kills():
    """How many processes the kernel has killed for want of memory, see proc(5)."""
    with contextlib.suppress(OSError), open('/proc/vmstat') as file:
        return next((int(line.split()[1]) for line in file if line.startswith('oom_kill ')), 0)


def name_process(config, role):
    """The name in ps and top (15 characters of it), see proc(5) on /proc/pid/comm."""
    prefix = config.procname_prefix or config.procname_prefix_spaced and config.procname_prefix_spaced + ' '
    name = config.procname_master if role == 'master' and config.procname_master else config.procname
    if config.auto_procname or prefix or name:
        with contextlib.suppress(OSError), open('/proc/self/comm', 'w') as file:        # not Linux, or after setuid()
            file.write((prefix or '') + (name or f'uWSGI {role}') + (config.procname_append or ''))


def finish_process(mercy, code):
    """Give the threads and the atexit functions of this process their time. The exit code."""
    import atexit
    threading = sys.modules.get('threading')

    def watch():
        """In a thread: say which others keep the process from ending, and end it if they never do."""
        time.sleep(min(1, mercy / 2))
        names = [repr(one.name) for one in threading.enumerate() if one is not main_thread and not one.daemon]
        log(f'pid {os.getpid()} has {mercy} s to end, and waits for '
            + (f'the thread {", ".join(names)}; with daemon=True it would not' if names else 'a function of atexit'))
        time.sleep(mercy)
        os._exit(code)
    if threading:
        main_thread = threading.main_thread()
        with contextlib.suppress(RuntimeError):         # no memory for a thread: then nobody watches
            start_thread(watch)
        threading._shutdown()
    atexit._run_exitfuncs()
    flush_streams()
    return code


class Child:
    """A worker as the master sees it: born, ready; marked if it needs a successor, and serving on until that is ready;
    told to stop again and again until it hears; ended, or killed. An old one, from before a reload, counts as ready and
    as having heard, since the new image can't read its rows."""

    def __init__(self, pid, number, born, foreign, told_at, hold, rows=None):
        self.pid, self.number, self.born = pid, number, born
        self.foreign = foreign                          # None: Python; 'known': Ruby or Perl; or 'unknown': worker-exec
        self.told_at, self.killed = told_at, False      # when it was told to stop, or inf
        self.hold = hold                                # the end of its lifeline that is ours, see spawn()
        self.alarm = 0.0, 0.0                           # harakiri: when the request began, and when it was told
        self.old = rows is None                         # from before a reload: we can't see what it does
        self.rows = rows or [Row()]
        self.numbers = self.rows[0].numbers
        self.numbers[PID], self.numbers[NUMBER] = pid, number
        if self.old:
            self.numbers[READY] = self.numbers[LEAVING] = self.numbers[HEARD] = 1
        elif foreign:
            self.numbers[READY] = born + 1              # it can't tell when: a second later

    def __str__(self):
        return f'worker {self.number} (pid {self.pid})'

    def is_marked(self):
        return self.numbers[LEAVING] > 0

    def mark(self, why):
        log(f'{self} leaves: {why}')
        self.numbers[LEAVING] = 1

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):   # the application may wait for our children: reap() will see it
            os.kill(self.pid, number)

    def busy(self):
        """[(when it began, row)] of its requests. The time is read once: a request may end meanwhile."""
        return [(began, row) for row in self.rows if (began := row.numbers[STARTED]) > 0]

    def doing(self, before):
        """'at GET /path for 41 ms', with 'at ' before it; '' when it is idle."""
        now = time.monotonic()
        requests = [f'{row.request()} for {max(0, now - began) * 1000:.0f} ms' for began, row in self.busy()]
        return before + ', '.join(requests) if requests else ''

    def answered(self):
        return sum(row.numbers[REQUESTS] for row in self.rows)


class Master:
    """The process that owns the sockets, and keeps the workers that there should be."""

    def __init__(self, config, owned, application, start, guard, signals, uwsgi, workers, touched, dropped):
        self.config, self.owned, self.application, self.uwsgi = config, owned, application, uwsgi
        self.guard, self.dropped = guard, dropped       # dropped: what disown() returned
        guard.descriptors = lambda: [one.socket.fileno() for one in owned] + [c.hold for c in self.children.values()]
        self.start, self.signals, self.touched = start, signals, touched        # {file to be touched: its time}
        self.listeners = [one for one in owned if one.protocol in ('uwsgi', 'http')]
        self.stats, self.command = Stats(self), worker_command(config)
        if self.command and not any(foreign for *_, foreign, _, _ in workers):
            for listener in self.listeners:             # workers in Python may have left it otherwise; from now on all
                listener.socket.setblocking(True)       # programs share what one of them makes of it
        self.children = {pid: Child(pid, *rest) for pid, *rest in workers}      # those from before a reload
        # Twice as many as workers: those that were told to stop may go on for a while.
        self.all_rows = [[Row() for _ in range(config.threads)] for _ in range(2 * config.processes + 2)]
        self.total = memoryview(mmap.mmap(-1, 4096)).cast('Q')
        self.now, self.wake = time.monotonic(), math.inf        # of a turn: when it began, when the next is due
        self.stopping, self.stopped_at = 0, -math.inf   # 0: no, 1: gracefully, 2 or more: at once; see stop()
        self.drained = False                            # have all been accepted who waited when the stop began?
        self.reload_wanted, self.proof, self.proof_began = False, None, 0.0     # proof: pid of who tries a reload
        self.announced = False
        self.failures, self.not_before = 0, 0.0         # deaths in a row; until when no worker is started, or inf: by
                                                        # this code none can be, only the old ones go on
        self.exit_code, self.oom_kills = 0, oom_kills()
        self.spawned, self.deaths, self.harakiris = [collections.Counter() for _ in range(3)]   # by worker's number
        self.fewest = config.cheaper if 0 < config.cheaper < config.processes else config.processes
        self.wanted = min(max(self.fewest, config.cheaper_initial, len(workers)), config.processes)     # at the moment
        self.calm, self.last_busy, self.last_answered = 0, self.now, 0
        looks = touched or self.fewest < config.processes or config.log_maxsize or config.idle \
            or self.command and config.reload_on_rss or 'WATCHDOG_USEC' in start.environment
        self.next_look = 0.0 if looks else math.inf

    def run(self):
        """Converge, sleep, and again; the exit code."""
        name_process(self.config, 'master')
        look_before_fork()
        gc.collect()
        gc.freeze()                                     # the workers' collections leave the shared pages alone
        while True:
            self.converge()
            if self.stopping and not self.children:
                return self.exit_code
            timeout = None if self.wake == math.inf else max(0, self.wake - time.monotonic())
            woken = select.select([self.signals, *self.stats.sockets], [], [], timeout)[0]
            self.now = time.monotonic()
            self.take_signals()
            for fd in set(woken) - {self.signals}:
                self.stats.answer(fd)

    def take_signals(self):
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.signals, 4096):
                self.on_signal(number)

    def on_signal(self, number):
        if number == signal.SIGTERM and not self.config.die_on_term:
            number = signal.SIGHUP
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            self.stop(at_once=number == signal.SIGQUIT)
        elif number == signal.SIGHUP:
            self.reload_wanted = True
        elif number in (signal.SIGUSR1, signal.SIGUSR2):
            if number == signal.SIGUSR1:
                follow_logs()
            elif not ready_within(2, select.POLLOUT, 0):        # it is full, and would hold the workers
                return
            for child in self.children.values():
                if not child.foreign:
                    child.send(number)
                    time.sleep(0.01 * (number == signal.SIGUSR2))       # faulthandler writes words, which would mix
                elif number == signal.SIGUSR1:          # it keeps the log that it began with: replace it
                    child.numbers[LEAVING] = 1

    def stop(self, at_once=False):
        """Once: when the requests at hand are finished; twice: at once. But timeout(1), and others, tell a process and
        then its group: what comes within half a second is the echo of the first."""
        if self.now < self.stopped_at + 0.5 and not at_once:
            return
        self.stopping, self.stopped_at = self.stopping + 1 + at_once, self.now
        self.start.at_once = self.stopping > 1
        busy = ''
        for child in self.children.values():
            child.told_at = min(child.told_at, self.now)
            busy += child.doing(f'; worker {child.number} busy with ')
        self.refuse_newcomers()
        self.end_proof()
        log('stopping at once' if self.stopping > 1 else 'stopping' + busy)
        self.notify('STOPPING=1')

    def notify(self, text):
        """Tell systemd how the server is, see sd_notify(3)."""
        address = self.start.environment.get('NOTIFY_SOCKET')
        if address:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.sendto(text.encode(), address.replace('@', '\0', 1))

    # -- one turn of the loop

    def converge(self):
        self.wake = math.inf
        self.reap()
        if not self.stopping and self.due(self.next_look):
            self.look_round()
        if not self.stopping:
            self.replace_workers()
            if self.reload_wanted:
                self.try_reload()
        for child in self.children.values():
            if not child.killed:
                self.keep_time(child)
        if self.stopping:
            self.refuse_newcomers()
        else:
            self.announce()                             # now that the old workers were told to stop

    def due(self, when):
        """Is it time? If not, the loop wakes up then, and asks again. (Some only want to be woken.)"""
        if when > self.now:
            self.wake = min(self.wake, when)
        return when <= self.now

    def is_ready(self, child):
        return child.numbers[READY] > 0 and self.due(child.numbers[READY])

    def serving(self):
        """The workers that weren't told to stop."""
        return [child for child in self.children.values() if child.told_at == math.inf]

    def reap(self):
        """Take note of all children that ended; as pid 1 of a container there are strangers among them."""
        try:
            while (ended := os.wait4(-1, os.WNOHANG))[0]:
                pid, code = ended[0], os.waitstatus_to_exitcode(ended[1])
                if pid == self.proof:
                    self.after_proof(code)
                elif pid in self.children:
                    self.bury(self.children.pop(pid), code, ended[2].ru_maxrss // 1024)
        except ChildProcessError:                       # there is none: has the application waited for ours?
            for pid in list(self.children):
                self.bury(self.children.pop(pid), 0, 0)
            if self.proof is not None:
                self.after_proof(EXIT_CONFIG)

    def bury(self, child, code, rss):
        """A worker ended: say why if nobody asked it to, and slow down if that comes again and again."""
        os.close(child.hold)
        child.numbers[PID] = 0                          # another may have its rows
        self.drained |= child.told_at == self.stopped_at and not code   # in order it goes when nobody waits any more
        told = child.told_at < math.inf and (self.stopping or code in (0, -signal.SIGTERM, -signal.SIGHUP))
        if child.killed or told:
            return
        if child.numbers[HEARD] and not code:
            return log(f'{child} ended: somebody else told it to')
        ready, doing = self.is_ready(child), child.doing('at ')
        when = doing or ('at what is unknown since the reload' if child.old else
                         'while idle' if ready else 'before it was ready')
        log(f'{child} died: {self.cause(code)}, {when}, peak rss {rss} MB')
        self.deaths[child.number] += 1
        worked = ready if child.foreign or child.old else doing or child.answered()
        self.failures = 0 if worked else self.failures + 1
        if code and not (self.announced or ready or any(map(self.is_ready, self.children.values()))):
            self.exit_code = EXIT_NO_APP if self.command or code < 0 else code
            self.stopping = 2                           # none was ever ready: a supervisor must see it
        elif self.not_before == math.inf and not self.children and self.proof is None:
            log('no worker is left, and none can be started since the last reload')
            self.exit_code, self.stopping = EXIT_CONFIG, 2
        elif self.failures and self.not_before < math.inf:
            seconds = min(30, 0.5 * 2 ** min(self.failures - 1, 6))
            self.not_before = max(self.not_before, self.now + seconds)
            log(f'a new one comes in {seconds:g} s')

    def cause(self, code):
        if code >= 0:
            return f'exit status {code}'
        name = next((one.name for one in signal.Signals if one == -code), f'signal {-code}')
        before, self.oom_kills = self.oom_kills, oom_kills()
        by = 'not sent by us' if self.oom_kills == before else 'by the OOM killer of the kernel: memory is short'
        return f'{name}, {by}' if code == -signal.SIGKILL else name

    def replace_workers(self):
        """Spawn what is missing, and one after the other a successor for each worker that must go."""
        may_replace = self.not_before < math.inf and all(map(self.is_ready, self.children.values()))
        places = collections.defaultdict(list)
        for child in self.serving():
            places[child.number].append(child)
            lifetime = self.config.max_worker_lifetime
            stagger = self.config.max_worker_lifetime_delta * (child.number - 1)
            if lifetime and not child.is_marked() and self.due(child.born + lifetime + stagger):
                child.mark('max-worker-lifetime')
        for number in range(1, self.wanted + 1):
            wanted = not places[number] or may_replace and all(child.is_marked() for child in places[number])
            if wanted and self.due(self.not_before):
                self.spawn(number)
                may_replace = False                     # one at a time
        for child in self.serving():
            succeeded = any(other.born > child.born and self.is_ready(other) for other in places[child.number])
            if child.is_marked() and succeeded or child.number > self.wanted and may_replace:
                child.told_at = self.now                # overdue_end() sends the signal

    def announce(self):
        """Once: all workers are ready, but for one that fails."""
        serving = self.serving()
        if not self.announced and serving and (len(serving) >= self.wanted or self.failures) \
                and all(self.is_ready(child) and not child.old for child in serving):
            self.announced = True
            many = '1 worker' if len(serving) == 1 else f'{len(serving)} workers'
            log(f'ready: {many}' + (f' with {self.config.threads} threads each' if self.config.threads > 1 else ''))
            self.notify(f'READY=1\nSTATUS=ready, {many}')
            self.start.tell_parent()

    def keep_time(self, child):
        """Tell a worker what it has to do; kill the one that doesn't heed it."""
        why = 'stopping at once' if self.stopping > 1 else self.overdue_end(child) or self.overdue_request(child)
        if why:
            log(f'{child} is killed: {why}' + child.doing(', at '))
            child.killed, child.told_at = True, min(child.told_at, self.now)
            child.send(signal.SIGKILL)

    def overdue_end(self, child):
        """Tell a worker to stop, if it has to. Why it must be killed, else ''."""
        config = self.config
        if child.told_at == math.inf:
            return ''
        if child.told_at == self.now or child.foreign != 'unknown':     # which may take a second SIGTERM for "at once"
            drain = self.stopping or child.foreign or child.old and self.dropped
            child.send(signal.SIGTERM if drain else signal.SIGHUP)
            self.due(self.now + 0.1)                    # again and again: it may come just before an accept()
        heard = child.foreign or child.busy() or child.numbers[HEARD]
        mercy = config.worker_reload_mercy if heard else min(2, config.worker_reload_mercy)
        if not self.due(child.told_at + mercy):
            return ''
        return f'it had {mercy} s to finish' + (
            '' if heard else ', and is idle: did the application set a handler of its own?')

    def overdue_request(self, child):
        """harakiri: tell a worker that its request takes too long. Why it must be killed, else ''."""
        config, began = self.config, min((began for began, _ in child.busy()), default=self.now)
        if not (config.harakiri and self.due(began + config.harakiri)):
            return ''                                   # idle: look again when a request from now on would be
        if began != child.alarm[0]:                     # once; then it has harakiri-graceful-timeout
            child.send(signal.SIGALRM)
            child.alarm = began, self.now
            self.harakiris[child.number] += 1
        return f'harakiri = {config.harakiri}' if self.due(child.alarm[1] + config.harakiri_graceful_timeout) else ''

    def refuse_newcomers(self):
        """At a stop, those who come later should ask another server, instead of waiting for the slowest request and
        being reset then. shutdown(2) ends a listener for all processes; over TCP it resets those who wait at it. Not
        for sockets that somebody else has bound (systemd), nor for programs, whose accept() would fail."""
        bound = [] if self.command or 'LISTEN_FDS' in self.start.environment else self.listeners
        for one in bound:
            nobody_waits = self.drained or one.socket.family == socket.AF_UNIX or not one.waiting()
            if nobody_waits and one.address[:5] != 'fd://':
                with contextlib.suppress(OSError):      # it is done already
                    one.socket.shutdown(socket.SHUT_RD)

    # -- every half second, if an option needs it

    def look_round(self):
        config, self.next_look = self.config, self.now + 0.5
        self.due(self.next_look)
        before, self.touched = self.touched, {name: mtime(name) for name in self.touched}
        self.reload_wanted |= self.touched != before
        if config.log_maxsize and rotate_log(config):
            self.on_signal(signal.SIGUSR1)
        self.notify('WATCHDOG=1')
        for child in self.serving() if self.command and config.reload_on_rss else ():
            rss = memory_of(child.pid)[1] >> 20         # a program doesn't look at it
            if rss >= config.reload_on_rss and not child.is_marked():
                child.mark(f'reload-on-rss, it has {rss} MB')
        ready = [child for child in self.serving() if self.is_ready(child)]
        if self.fewest < config.processes and len(ready) >= self.wanted:
            self.scale(sum(len(child.busy()) == config.threads for child in ready), len(ready))
        answered = sum(child.answered() for child in ready)
        if answered != self.last_answered or any(child.busy() for child in ready):
            self.last_busy, self.last_answered = self.now, answered
        elif config.idle and config.die_on_idle and not self.command and self.now - self.last_busy > config.idle:
            log(f'idle for {config.idle} s')
            self.stop()

    def scale(self, busy, there):
        """cheaper: a step more when all workers are busy, or (backlog) too many connections wait; one less when two
        or more were idle at 2 * cheaper-overload looks since then."""
        config, before = self.config, self.wanted
        waiting = sum(listener.queue()[0] for listener in self.listeners)
        backlog = self.command or config.cheaper_algo == 'backlog'      # whether a program is busy isn't known
        if (waiting > config.cheaper_overload if backlog else busy == there) or waiting and busy == there:
            self.calm, self.wanted = 0, min(config.processes, self.wanted + config.cheaper_step)
        elif busy + 1 < there:
            self.calm += 1
            if self.calm > 2 * config.cheaper_overload:
                self.calm, self.wanted = 0, max(self.fewest, self.wanted - 1)
        if self.wanted != before:
            log(f'cheaper: {busy} of {there} workers are busy, {waiting} connections wait: {self.wanted} workers')

    # -- a worker's life

    def spawn(self, number):
        """fork(), and all that belongs to it."""
        rows = next((rows for rows in self.all_rows if not rows[0].numbers[PID]), None)
        if rows is None:                                # so many old ones are still finishing
            return
        for row in rows:
            row.memory[NUMBERS:] = bytes(ROW_SIZE - NUMBERS)
        flush_streams()
        master, pipe = os.getpid(), ()
        self.guard.is_worker = True
        try:
            pipe = lifeline, hold = os.pipe()
            pid = os.fork()
        except OSError as error:                        # too many processes or descriptors, no memory: later, perhaps
            for fd in pipe:
                os.close(fd)
            log(f'fork: {error.strerror}; the next try comes in 1 s')
            self.not_before = self.now + 1
            self.due(self.not_before)
            return
        finally:
            self.guard.is_worker = False
        if pid == 0:
            self.live_as_worker(number, rows, lifeline, hold, master)
        os.close(lifeline)
        foreign = self.command and ('unknown' if self.config.worker_exec else 'known')
        self.children[pid] = Child(pid, number, self.now, foreign, math.inf, hold, rows)
        self.spawned[number] += 1
        self.is_ready(self.children[pid])               # to be woken when a program counts as ready

    def live_as_worker(self, number, rows, lifeline, hold, master):
        """In the child: let go of what is the master's, work, end."""
        status = 1
        try:
            import fcntl
            for fd in (hold, *(child.hold for child in self.children.values())):
                os.close(fd)
            not_ours = [one.socket for one in self.owned if one not in self.listeners]
            for one in not_ours + list(self.stats.sockets.values()):
                one.close()
            fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
            if os.getppid() == master:                  # else it died before the lifeline was set
                self.work(number, rows, master)
            status = finish_process(self.config.worker_reload_mercy, 0)
        except SystemExit as error:
            status = error.code if type(error.code) is int else 1
        except BaseException:
            log_exception(f'worker {number} failed')
        finally:
            os._exit(status)                            # Python's own end would touch, and so copy, all shared pages

    def work(self, number, rows, master=None):
        """Be a worker until told to stop: of a master, or without one."""
        if master:
            signal.set_wakeup_fd(-1)                    # that pipe is the master's
        name_process(self.config, f'worker {number}')
        if self.command:
            become(self.command, [listener.socket for listener in self.listeners], master)
            sys.exit(EXIT_NO_APP)
        worker = Worker(self.config, self.listeners, self.application, rows, self.total, number, master)
        worker.all_rows, self.uwsgi.worker = self.all_rows, worker
        rows[0].numbers[PID], rows[0].numbers[NUMBER] = os.getpid(), number
        worker.handle_signals()
        if worker.application is None:
            worker.application = load_or_log(self.config)
            if worker.application is None:
                sys.exit(EXIT_NO_APP)
        for hook in self.uwsgi.hooks:
            hook()
        worker.handle_signals()                         # the application may have set others meanwhile
        if not master:
            stop = functools.partial(self.stop_alone, worker)
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, stop)
            signal.set_wakeup_fd(-1)
            with contextlib.suppress(BlockingIOError):  # what came before there was a worker to hear it
                if {signal.SIGINT, signal.SIGTERM, signal.SIGQUIT} & {*os.read(self.signals, 4096)}:
                    stop()
            for name in 'harakiri', 'stats', 'touch_reload', 'max_worker_lifetime', 'py_autoreload':
                if getattr(self.config, name):
                    log(f"{name.replace('_', '-')} needs a master: it does nothing with master = false")
            log('ready: this process serves, without a master')
            self.start.tell_parent()
        worker.run()

    def stop_alone(self, worker, *_):
        """Without a master: the first signal ends the worker in order, and in time; the second at once."""
        self.now = time.monotonic()
        self.stop()
        if self.stopping > 1:
            vacuum_all(self.config, self.owned)
            flush_streams()
            os._exit(0)
        worker.on_stop(signal.SIGTERM, None)
        signal.signal(signal.SIGALRM, functools.partial(self.stop_alone, worker))
        signal.setitimer(signal.ITIMER_REAL, self.config.worker_reload_mercy)

    # -- reload

    def try_reload(self):
        """First the proof: a child does what --check does. Only one at a time, and it may hang; and another reload
        waits until the last has replaced all, or can't."""
        if self.proof is not None and self.due(self.proof_began + min(10, self.config.worker_reload_mercy)):
            log('reload: the code that was tried since then is given up for newer code')
            self.proof_began = self.now
            self.end_proof()
        if self.proof is not None or any(child.old for child in self.serving()) and self.now >= self.not_before:
            return
        self.reload_wanted, self.proof_began = False, self.now
        log('reload: trying the new configuration and application')
        self.notify(f'RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=reloading')
        self.proof = self.start_python(os.posix_spawn, ['--check'], {}, setsigmask=[signal.SIGINT], setsigdef=SIGNALS,
                                       file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])

    def end_proof(self):
        try:
            if self.proof is not None:
                os.kill(self.proof, signal.SIGKILL)
        except ProcessLookupError:                      # the application has waited for it
            self.proof = None

    def after_proof(self, code):
        """Then the same process with new code. It inherits what we own and our children, see start_and_run()."""
        self.proof = None
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)       # until the new image has its handlers
        self.take_signals()                             # what came before would be lost
        wanted = not (self.stopping or self.reload_wanted)      # else there is newer code to be proved
        if wanted and code:
            self.reload_failed(f'{self.cause(code)}, see above; the old code goes on serving')
        elif wanted:
            import json
            self.start.tell_parent()                    # the new image won't have this pipe
            owned = [(one.address, one.protocol, one.inode, one.socket.fileno()) for one in self.owned]
            workers = [(c.pid, c.number, c.born, c.foreign, c.told_at, c.hold) for c in self.children.values()]
            for *_, fd in owned + workers:
                os.set_inheritable(fd, True)
            self.start_python(os.execve, [], {RELOADED: json.dumps([owned, workers])})
            for *_, fd in owned + workers:              # it failed, we are still here
                os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def start_python(self, how, arguments, environment, **options):
        """As we were started, and there. That Python is gone, or memory short, must not end a server that works."""
        try:
            here = os.open('.', os.O_RDONLY)
            os.fchdir(self.start.directory)
            with contextlib.suppress(OSError):          # it may have been removed and made again
                os.chdir(self.start.path)
            try:
                os.getcwd()                             # fails if the directory was removed: the new image would, too
                return how(sys.executable, self.start.command + arguments, {**self.start.environment, **environment},
                           **options)
            finally:
                os.fchdir(here)
                os.close(here)
        except OSError as error:
            what = error.filename or 'the directory of the start'
            self.reload_failed(f'{what}: {error.strerror}; the old code goes on serving')

    def reload_failed(self, why):
        log(f'reload: failed, {why}')
        self.notify('READY=1\nSTATUS=the last reload failed, the old code is serving')


# ---------------------------------------------------------------------------------------------
# 15. Command line
#
# main() reads the configuration; start_and_run() has the steps of a start in their order. Ports below 1024, chown and
# /run may need root, so it takes sockets and pidfile first (set_up); no line of the application may run as root, so it
# is loaded after drop_privileges(). A reload has root's rights no more: what it binds anew, it binds without.

def demo(environ, start_response):
    """The application of example.ini: says who answered, and what it was asked. /file sends this file."""
    if environ['PATH_INFO'] == '/file':
        file = open(__file__, 'rb')
        size = str(os.fstat(file.fileno()).st_size)
        start_response('200 OK', [('Content-Type', 'text/x-python'), ('Content-Length', size)])
        return environ['wsgi.file_wrapper'](file)
    lines = [f'minuwsgi {__version__}: this is worker process {os.getpid()}.', '',
             *(f'{name} = {value}' for name, value in sorted(environ.items())),
             '', '/file sends the source of the server.', '']
    body = '\n'.join(lines).encode()
    start_response('200 OK', [('Content-Type', 'text/plain; charset=utf-8'), ('Content-Length', str(len(body)))])
    return [body]


class Start:
    """How the server was started, to start it again in the same way."""

    def __init__(self, arguments):
        self.environment = {name: value for name, value in os.environ.items() if name != RELOADED}
        here, shown = os.getcwd(), os.environ.get('PWD', '')
        is_here = os.path.isabs(shown) and os.path.isdir(shown) and os.path.samefile(shown, here)
        self.path = shown if is_here else here          # perhaps a link, which leads to a newer release at a reload
        self.directory = os.open('.', os.O_RDONLY)
        script, module = os.path.join(self.path, sys.argv[0]), sys.modules['__main__'].__spec__
        self.program = ['-m', module.name] if module else [script]
        known = ['', *self.program, *arguments]         # Python 3.9 knows no more
        self.command = [sys.executable, *getattr(sys, 'orig_argv', known)[1:]]
        if os.path.dirname(script) not in (here, self.path):    # another Python may find no module of that name
            self.program = [script]
        self.pid, self.parent = os.getpid(), None       # parent: the end of a pipe to who waits in front
        self.at_once = False                            # should it end without waiting for anything?

    def daemonize(self, name):
        """Go on in the background. The process in front waits until the workers are ready; if they never
        are, it shows the log and ends with the server's exit code."""
        wait, self.parent = os.pipe()
        at = os.path.getsize(name) if os.path.exists(name) else 0
        pid = os.fork()
        if not pid:
            os.close(wait)
            os.setsid()
            self.pid = os.getpid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            return
        os.close(self.parent)
        try:
            if os.read(wait, 1):
                os._exit(0)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.kill(pid, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError), open(name, 'rb') as file:
            file.seek(at)
            os.write(2, file.read())
        os._exit(code if code > 0 else 1)

    def tell_parent(self):
        if self.parent is not None:
            with contextlib.suppress(OSError):          # it may have been ended
                os.write(self.parent, b'.')
            os.close(self.parent)
            self.parent = None


def curl(address='SOCKET', path='/'):
    """Ask a uwsgi server for a path, and print what it answers."""
    name, _, query = path.partition('?')
    host, tcp, port = address.rpartition(':')
    size = 0
    try:
        if tcp and '/' not in address:
            connection = socket.create_connection((host.strip('[]') or '127.0.0.1', int(port)))
        else:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect('\0' + address[1:] if address[:1] == '@' else address)
        with connection:
            connection.settimeout(60)
            connection.sendall(pack_request({
                'REQUEST_METHOD': 'GET', 'REQUEST_URI': path, 'PATH_INFO': unquote(name), 'QUERY_STRING': query,
                'SERVER_PROTOCOL': 'HTTP/1.1', 'SERVER_NAME': 'localhost', 'SERVER_PORT': '80',
                'HTTP_HOST': 'localhost'}))
            while data := connection.recv(READ_MAX):
                size += sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--curl {address}: {getattr(error, 'strerror', None) or error}") from None
    if not size:
        raise ConfigError(f'--curl {address}: the connection was closed without an answer')


def prepare(config):
    """Make the process what the options ask for; what the application sees is in place then."""
    import resource
    if config.umask is not None:
        os.umask(config.umask)
    path = []
    for item in config.env:
        name, _, value = map(str.strip, item.partition('='))
        try:
            os.environ[name] = value
        except (OSError, ValueError):
            raise ConfigError(f'{config.where(item, "env")}env = {name}: NAME=value is expected') from None
        if name == 'PYTHONPATH':
            path = value.split(':')
        elif name[:6] == 'PYTHON' and name != 'PYTHONUNBUFFERED':
            log(f'warning: {config.where(item, "env")}{name} is only read when Python starts: set it before that')
    time.tzset()                                        # TZ may be one of them
    for kind, limit in (resource.RLIMIT_NOFILE, config.max_fd), (resource.RLIMIT_AS, config.limit_as << 20):
        hard = resource.getrlimit(kind)[1]
        try:
            if limit:
                resource.setrlimit(kind, (limit, hard if hard < 0 else max(limit, hard)))
        except (OSError, ValueError) as error:
            log(f'max-fd, limit-as: {error}')
    change_directory(config, 'chdir')
    sys.path[:0] = [os.getcwd(), *map(os.path.abspath, path)]
    for directory in config.pythonpath:                 # each in front of those before it
        for found in glob_sorted(directory) or [directory]:
            sys.path.insert(0, os.path.abspath(found))
    sys.argv[1:] = config.pyargv.split() if config.pyargv else []
    sys.modules.setdefault('minuwsgi', sys.modules[__name__])       # `module = minuwsgi:demo` is this file


def enter_python(config, start):
    """Go on as the Python of `virtualenv`, unless this is it. What is wrong is added to config.errors."""
    directory = os.path.abspath(os.path.join(config.chdir or '', config.virtualenv or sys.prefix))
    tried = os.environ.pop('MINUWSGI_VIRTUALENV', None) == directory
    if os.path.realpath(sys.prefix) == os.path.realpath(directory):
        return
    python, why = os.path.join(directory, 'bin', 'python'), 'its Python is not that of a virtual environment'
    try:
        if not tried:
            os.execve(python, [python, *start.program, *sys.argv[1:]], {**os.environ, 'MINUWSGI_VIRTUALENV': directory})
    except OSError as error:
        why = f"can't run its bin/python ({os.path.realpath(python)}), {error.strerror}"
    config.errors.append(f"{config.where(config.virtualenv, 'virtualenv')}virtualenv = {directory}: {why}; make one "
                         f'with: python3 -m venv {directory}')


NO_SOCKET = 'no socket is named: set socket = PATH or http-socket = :8000'


class Pidfile:
    """The file with the master's pid, locked while the master lives: a stale one is no obstacle. It is
    owned, inherited and removed as a Listener is, and has its names: `socket` is the file."""

    def __init__(self, config, address, protocol, inode, fd):
        import fcntl
        self.address, self.name, self.protocol = address, address, protocol
        try:
            self.socket = open(open_safely(address, os.O_RDWR, 0o644) if fd is None else fd, 'rb+', buffering=0)
            self.inode = inode_of(os.fstat(self.socket.fileno()))
            fcntl.flock(self.socket, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fd is None:
                self.socket.truncate()
                self.socket.write(b'%d\n' % os.getpid())
        except BlockingIOError:
            raise ConfigError(f'pidfile = {address}: a server with the pid {self.socket.read().decode().strip()} '
                              'holds it; stop it first') from None
        except OSError as error:
            raise ConfigError(f"pidfile = {address}: can't write it: {error.strerror}") from None


def activated():
    """{name: (None, descriptor)} of the sockets that systemd has bound for us, see sd_listen_fds(3)."""
    found, pid, many = {}, os.environ.pop('LISTEN_PID', ''), os.environ.pop('LISTEN_FDS', '0')
    for fd in range(3, 3 + int(many)) if pid == str(os.getpid()) else ():
        with borrowed(fd) as listener:
            found[name_of(listener.getsockname())] = None, fd           # no inode: its file isn't ours to remove
    return found


def take_from(there, address):
    """Take the (inode, descriptor) of an address in an option from {name of the kernel: (inode, descriptor)}; None if
    it isn't there. [::]:80 is 0.0.0.0:80 too to the kernel, if not told otherwise."""
    name = address
    with contextlib.suppress(ConfigError, OSError, ValueError):         # acquire() will tell
        kind, where = parse_address(address) if there else ('fd', None)         # mostly no host need be looked up
        if kind != 'fd':
            name = name_of(where if kind == 'unix' else resolve(*where)[-1])
    names = name, name.replace('[::]', '0.0.0.0'), name.replace('0.0.0.0', '[::]')
    return next((there.pop(one) for one in names if one in there), None)


def acquire(config, owned, address, protocol, inode, fd):
    """Bind an address, or create the pidfile; or, with a descriptor, go on with what is there already."""
    with config.errors_at(address):
        owned.append((Pidfile if protocol == 'pidfile' else Listener)(config, address, protocol, inode, fd))


def addresses(config):
    """[(address, protocol)] of what the options name, the pidfile too."""
    names = dict.fromkeys((address, protocol) for protocol, values in (
        (config.protocol, config.socket), ('uwsgi', config.uwsgi_socket), ('http', config.http_socket),
        ('stats', [config.master and config.stats]), ('pidfile', [config.pidfile])) for address in values if address)
    for address, _ in names:
        if len([name for name in names if name[0] == address]) > 1:
            raise ConfigError(f'{config.where(address)}{address} is named twice, and can only speak one protocol')
    return list(names)


def is_lost(one):
    """Has somebody removed the file of a socket? (A pidfile holds by its lock.)"""
    if not one.inode or one.protocol == 'pidfile':
        return False
    try:
        os.lstat(one.name)
    except OSError as error:
        return error.errno == errno.ENOENT              # else it may be there, where we have no right to look any more
    return False


def bind(config, owned):
    """Own what the options name, listeners and the pidfile, and what systemd has bound. Returns what was owned before
    a reload and isn't wanted any more, for disown()."""
    names, given = addresses(config), activated()
    config.socket_owner = socket_owner(config)          # a mistake in it is told before anything is bound
    wanted = {name: take_from(given, name[0]) for name in names}
    wanted.update({(f'fd://{fd}', config.protocol): (None, fd) for _, fd in given.values()
                   if f'fd://{fd}' not in dict(names)})
    before = {(one.address, one.protocol): one for one in owned if (one.address, one.protocol) in wanted}
    unwanted = [one for one in owned if one not in before.values()]     # of two with one name the first lost its file
    again = {one.name: (one.inode, one.socket.fileno()) for one in unwanted}    # may have a new address, or protocol
    for name, there in wanted.items():
        if name not in before:
            acquire(config, owned, *name, *(there or take_from(again, name[0]) or (None, None)))
        elif is_lost(before[name]):
            try:
                acquire(config, owned, *name, None, None)
                unwanted.append(before[name])
            except ConfigError as error:
                log(f'warning: the file of the socket was removed, and {error}')
    ours = [one for one in owned if one not in unwanted]
    if not any(one.protocol in ('uwsgi', 'http') for one in ours):
        raise ConfigError(NO_SOCKET)
    log('listening on ' + ', '.join(f'{one.name} ({one.protocol})' for one in ours if one.protocol != 'pidfile'))
    if config.listen > LISTEN_MAX:
        log(f'listen = {config.listen}: the kernel allows {LISTEN_MAX}; '
            f'for more: sysctl net.core.somaxconn={config.listen}')
    return unwanted


def disown(owned, unwanted):
    """Let go of what bind() returned; not before the new code is loaded, as the old may have to serve on. Returns
    whether there is a socket where only the old workers listen now."""
    kept, dropped = {one.socket.fileno() for one in owned if one not in unwanted}, False
    for one in unwanted:
        owned.remove(one)                               # first: ForkGuard asks for the descriptors of all that is there
        if one.socket.fileno() in kept:                 # it has another name or protocol now
            one.socket.detach()
            continue
        dropped |= one.protocol in ('uwsgi', 'http')
        vacuum(one)
        one.socket.close()
    return dropped


def drop_privileges(config):
    """Become uid and gid, for good, see credentials(7)."""
    import pwd
    if not (os.getuid() or config.uid):
        log('warning: the application runs as root, and so does whoever finds a hole in it: set uid and gid')
    uid, gid = user_and_group(config)
    if uid in (-1, os.getuid()) and gid in (-1, os.getgid()):
        return
    __import__('traceback')                             # for log_exception(): later it may not be ours to read
    name = None
    with contextlib.suppress(KeyError, OverflowError):
        user = pwd.getpwuid(max(0, uid))                # a gid without a uid: root's, no other can set it
        name, gid = user.pw_name, user.pw_gid if gid < 0 else gid
    if gid < 0:
        raise ConfigError(f'uid = {config.uid}: nothing is known of this user, so set gid too')
    try:
        os.setgid(gid)
        os.initgroups(name, gid) if name else os.setgroups([])
        if uid >= 0:
            os.setuid(uid)
    except (OSError, OverflowError) as error:
        if not os.getuid():
            raise ConfigError(f'uid, gid: {error}') from None
        log('warning: uid and gid do nothing: only root can become another user')
    if uid > 0 and 0 in os.getresuid():
        raise ConfigError('uid: the privileges of root could not be dropped')


def check(config):
    """Print each line of the configuration, then all that would stop a start. The exit code."""
    offer_uwsgi_module(config)
    show_config(config)
    errors, sockets = list(config.errors), config.socket + config.uwsgi_socket + config.http_socket
    for path in config.pidfile, config.logto, *config.req_logger:
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path))):
            why = 'is a directory' if os.path.isdir(path) else 'there is no such directory'
            errors.append(f'{config.where(path)}{path}: {why}')
    trials = [(prepare, config), (socket_owner, config), (addresses, config)]
    trials += [(parse_address, address) for address in (*sockets, config.stats) if address]
    trials += [(drop_privileges, config)] if config.uid or config.gid else []
    for trial, what in trials:
        try:
            trial(what)
        except ConfigError as error:
            errors.append(config.where(what) + str(error))
    if not sockets and 'LISTEN_FDS' not in os.environ:
        errors.append(NO_SOCKET)
    for error in errors:
        log(f'minuwsgi: {error}')
    loaded = load_or_log(config) is not None
    return finish_process(1, EXIT_CONFIG if errors else 0 if loaded else EXIT_NO_APP)


def open_logs(config, start, reloaded):
    """Go to the background, open the logs, say who we are."""
    for name in 'NOTIFY_SOCKET', 'WATCHDOG_USEC':       # not for the application, and what it starts
        os.environ.pop(name, None)
    if config.log_date is not None:
        Log.date = config.log_date if '%' in config.log_date else '%a %b %d %H:%M:%S %Y'
    if config.daemonize and not reloaded:
        start.daemonize(config.logto)
    printed = Log(1)
    for one in main_log, printed:
        if config.logto and not reloaded:               # after a reload it may not be ours to open
            with config.errors_at(config.logto):
                one.open_file(config.logto)             # even if it is that file already: perhaps not to its end
        one.path = config.logto
    sys.stdout = io.TextIOWrapper(printed, 'utf-8', 'backslashreplace', line_buffering=True)
    sys.stderr = io.TextIOWrapper(main_log, 'utf-8', 'backslashreplace', line_buffering=True)
    follow_logs()
    for name in config.req_logger if not reloaded else ():
        with config.errors_at(name):
            fresh, fd = not os.path.lexists(name), open_to_append(name)
        if fresh and not os.getuid():
            os.fchown(fd, *user_and_group(config))      # as whom the workers will open it
        os.close(fd)
    log(f"minuwsgi {__version__}, Python {sys.version.split()[0]}, pid {os.getpid()}{', reloaded' * reloaded}")
    for text in config.print:
        log(text)


def set_up(config, start, owned, inherited):
    """What may need root's rights, up to giving them up. What isn't named any more, for disown()."""
    for one in inherited:                               # first: whatever fails then, the old workers need them
        acquire(config, owned, *one)
    if config.errors:
        raise ConfigError('\n'.join(config.errors))
    prepare(config)
    unwanted = bind(config, owned)
    drop_privileges(config)
    for name in __file__, os.__file__, os.getcwd(), *(file for file, _ in config.files):
        if not os.access(name, os.R_OK, dir_fd=start.directory):
            log(f"warning: {name} can't be read with uid = {config.uid}: no reload will work until it can")
    return unwanted


def start_and_run(config, start, owned):
    """The steps of a start in their order; `owned` gathers what has to be removed at the end. The exit code."""
    reloaded, inherited, workers = RELOADED in os.environ, [], []
    if reloaded:                                        # what the image before owned, see Master.after_proof()
        import json
        inherited, workers = json.loads(os.environ.pop(RELOADED))
    for *_, fd in inherited + workers:                  # at once, before the application can start anything
        os.set_inheritable(fd, False)
    open_logs(config, start, reloaded)
    signals, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    catch_signals(wake, starting=not reloaded)          # after a reload a stop is the Master's: it has workers to end
    uwsgi, application, code, stopped = offer_uwsgi_module(config), None, EXIT_CONFIG, False
    guard = ForkGuard(SIGNALS, lambda: [one.socket.fileno() for one in owned] + [start.parent] * bool(start.parent))
    try:
        unwanted, code = set_up(config, start, owned, inherited), 0
    except ConfigError as error:
        log(f'minuwsgi: {error}')
    except Exception:                                   # there may be workers to be kept
        log_exception('minuwsgi: the start failed')
    touched = {name: mtime(name) for name in config.touch_reload + config.touch_chain_reload}   # before we load
    if not (code or config.lazy_apps and (config.master or reloaded)):          # else the workers load it
        try:
            catch_signals(wake, starting=True)          # after a reload too: loading may take long
            application = load_or_log(config)
            catch_signals(wake)                         # within try: a stop may come until this is done
        except Stopped:
            if not reloaded:
                raise
            stopped = True                              # run() will do it: the signal is in the pipe too
        code = EXIT_NO_APP if application is None else 0
        guard.end_child('the import')
    if code and not reloaded:
        return code
    dropped = not code and disown(owned, unwanted)
    catch_signals(wake)
    master = Master(config, owned, application, start, guard, signals, uwsgi, workers, touched, dropped)
    if code:
        master.not_before = math.inf
    if code and not stopped:
        master.reload_failed('see above; the old workers go on serving, none can be replaced until the next reload')
    if config.master or reloaded:
        return master.run()
    master.work(1, master.all_rows[0])
    return 0


def run_server(config, start):
    """The server, until it is told to stop. Its exit code."""
    owned, code = [], 0
    try:
        code = start_and_run(config, start, owned)
    except Stopped:
        log('stopped while starting')
    finally:
        if os.getpid() != start.pid:                    # a child of the application, which owns nothing
            os._exit(1)
        vacuum_all(config, owned)
    for number in signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2:
        signal.signal(number, signal.SIG_IGN)
    for number in signal.SIGINT, signal.SIGQUIT:        # these end us, whatever we wait for
        signal.signal(number, lambda *_: os._exit(code))
    if start.at_once:
        flush_streams()
        os._exit(code)
    finish_process(config.worker_reload_mercy, code)
    for number in signal.SIGINT, signal.SIGQUIT:
        signal.signal(number, signal.SIG_IGN)           # Python's own end resets handlers: they would kill
    return code


def send_signal(what, name='PIDFILE'):
    """--stop, --reload PIDFILE."""
    import fcntl
    try:
        with open(name) as file:
            pid = int(file.read())
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return os.kill(pid, signal.SIGTERM if what == '--stop' else signal.SIGHUP)
    except (OSError, ValueError) as error:
        raise ConfigError(f'{what} {name}: {getattr(error, "strerror", None) or "there is no pid in it"}') from None
    raise ConfigError(f'{what} {name}: the server with the pid {pid} does not run any more')


def main(arguments):
    """Run the command line; the exit code, or None for 0."""
    try:
        if '--help' in arguments or '-h' in arguments:
            return print(usage())
        if not (arguments or any(name.startswith('UWSGI_') for name in os.environ)):
            print(usage())
            raise ConfigError('an application is expected, or an INI file; for a first look: '
                              'python3 minuwsgi.py minuwsgi:demo --http-socket :8000')
        if '--version' in arguments:
            return print(__version__)
        if arguments[:1] == ['--curl']:
            return curl(*arguments[1:3])
        if arguments[:1] in (['--stop'], ['--reload']):
            return send_signal(*arguments[:2])
        start, config = Start(arguments), Config(arguments)
        if config.show_config and config.setters['show-config'].where == COMMAND_LINE:
            return show_config(config)
        enter_python(config, start)
        if config.check:
            return check(config)
        if config.show_config:                          # in the file, as with uWSGI: the start goes on
            show_config(config)
        for warning in config.warnings:
            log(warning)
        if config.errors and RELOADED not in os.environ:        # there are workers to be kept
            raise ConfigError('\n'.join(config.errors))
        return run_server(config, start)
    except ConfigError as error:
        log(f'minuwsgi: {error}')
        return EXIT_CONFIG


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
