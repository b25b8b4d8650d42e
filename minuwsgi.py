"""minuwsgi: an application server after uWSGI's model, in one file of Python's standard library.

    python3 minuwsgi.py example.ini             run; --help lists the options, README.md the rest
    python3 -m minuwsgi example.ini             the same from its bytecode: starts faster, takes less memory
    python3 minuwsgi.py --check site.ini        look for all that would stop a start

The parts, from the leaves to main(); each uses only what stands above it:

     1 Options      settings from INI files and the command line become a Config
     2 Log          one line, one write; a log that nobody reads holds nobody up
     3 Sockets      Listener: bind with the right mode, refuse what isn't ours, vacuum
     4 uwsgi        the packet that nginx sends, read plainly (unpack_vars) and by guess (Expected)
     5 HTTP         a head becomes the same environ
     6 WSGI         input, Response, and the jobs that send it
     7 Static files and 8 Other languages: CGI, Ruby and Perl under the same master
     9 Offload      a thread that finishes the jobs for which a worker should not wait
    10 Worker       Core.serve(), the hot path; Core.wait() for several sockets and HTTP
    11 Loading      the application is found, or said where it was looked for
    12 Statistics   what each worker does, as JSON and for Prometheus
    13 Master       forks, watches, replaces, reloads
    14 Command line main()

The life of a request. A worker waits in accept() (Core.serve). It reads the packet into its Row of the
scoreboard, where the master can see it; the packet becomes environ (Expected, or Expected.rest). The
application gets environ and Response.start_response, which checks the head. A small body leaves with the
head in one write, and the connection is closed: accept4, preadv2, write, close; one more write is the
line of the request log. What is larger becomes a job (Response.finish): run_a_while() runs it for a
moment; then Offloader.take() owns job and descriptor, and the worker takes the next request. Over HTTP,
Core.wait() watches the kept connections, and Core.http_request() stands where the middle of serve() does.
Exceptions end in Core.failed(): 400 and the like for a bad request, nothing for a client that left, 500
or a cut connection and a traceback in the log for an application that failed.

The life of a signal. In the master it becomes a byte in a pipe (Signals); Master.run() wakes, on_signal()
notes what is wanted, and converge() compares what is with what should be: reap() the dead, kill what is
overdue, spawn() what is missing, one after the other replace what must go. A worker that is told to stop
(Worker.on_stop) finishes its request; a pipe that nobody writes to, in the place of its listener, makes
the next accept() fail. For a reload a child tries the new code (--check); then the master executes itself
anew, inherits sockets and old workers (after_proof, adopt), and replaces these.

Who owns what. The master: sockets and their files, the pidfile, the workers' lifelines. A worker: the
connection it accepted, until it closes it or gives it to an Offloader, which closes it when the job is
done, or parks it if HTTP keeps it; a job closes only the file that it sends. The application: what it
opened, and close() of its result is always called.
"""
import collections
import contextlib
import errno
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

__version__ = '0.1'


# ---------------------------------------------------------------------------------------------
# 1. Options and the INI dialect
#
# uWSGI's configuration is one flat list of settings (name, value, where it stands) from the
# environment (UWSGI_*), the command line and INI files. Config gathers the list (files include files;
# if and for blocks choose and repeat lines), then fills in $(ENV), @(file) and %(name), looks each
# name up in the table and converts its value. Every line has a fate: used, always (needs no switch
# here), unsupported, variable (only a name for %(name)) or unknown. All mistakes are told at once.

class ConfigError(Exception):
    """A mistake in the configuration; its text says where, what and what to do."""


class AppError(Exception):
    """The application can't be loaded."""


# The tables are texts: one row a line, and indented lines that continue it.
#
# Options: names (the first is ours, the others are accepted, -x is the short form), kind of value (with
# + the option may be repeated, and its values gather), default, meaning. Parser, --help and the README's
# table come from here. A row without | is a heading.
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
env | pair+ | | NAME=value for the application
import pyimport py-import python-import | word+ | | import this module before the application
pyargv | text | | sys.argv[1:] for the application
lazy-apps lazy | flag | false | load the application in each worker, not once before the fork
py-autoreload py-auto-reload python-autoreload python-auto-reload
    | seconds | 0 | look for changed modules in this interval, and reload
worker-exec worker-exec2 | text | | run this command as the workers, the socket as its stdin
Sockets
socket -s | word+ | | listen here: path, host:port, :port, [v6]:port, @abstract, fd://N
protocol socket-protocol | protocol | uwsgi | what `socket` speaks: uwsgi or http
uwsgi-socket | word+ | | speak the uwsgi protocol here
http-socket http http11-socket httprouter | word+ | | speak HTTP/1.1 here
chmod-socket chmod -C | octal | | mode of unix sockets (default 660; without a value 666)
chown-socket | word | | owner of unix sockets: user or user:group
umask | octal | | umask of the server and the application
listen -l | positive | 1024 | how many connections may wait
vacuum | flag | false | remove unix sockets and the pidfile at the end
socket-timeout -z | positive | 4 | seconds without progress until a client is given up
http-timeout | positive | 60 | seconds that an idle or slow client may take where no worker waits
limit-post | number | 0 | the largest request body in bytes (0: any)
trust-proxy | network+ | | believe X-Forwarded-For and -Proto from this address, or network 10.0.0.0/8
add-header | text+ | | a header for every response: Name: value
Processes
master -M | flag | true | `false`: no fork, one process that serves, for a debugger
processes workers -p | positive | 1 | how many workers
threads | positive | 1 | how many requests a worker serves at once
offload-threads offload-thread | number | 0 | threads in a worker that finish large responses (at least 1)
cheaper | number | 0 | how many workers there are at least; the rest come when needed
cheaper-initial | number | 0 | how many workers there are at the start
cheaper-step | positive | 1 | how many workers are added at a time
cheaper-overload | number | 3 | seconds of calm until one worker less, or, for backlog, waiting connections
cheaper-algo | word | spare | spare: more when all are busy; backlog: when too many connections wait
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
logger | text+ | | log to file:PATH or stdio
req-logger logger-req | text+ | | the same for the lines of requests alone
log-maxsize | number | 0 | rename the log when it has so many bytes, and start a new one
log-backupname | path | | name for it then (default: the time is added)
log-date logdate | text | | put the time before each line (true, or a strftime format)
log-format logformat | text | | format of the lines of requests, with %(uri), %(status) …
log-x-forwarded-for | flag | false | log the address in X-Forwarded-For
disable-logging -L | flag | false | no line for each request
log-4xx | flag | false | but for those that failed with 4xx
log-5xx | flag | false | but for those that failed with 5xx
log-slow | number | 0 | but for those that took so many milliseconds
log-zero | flag | false | but for those with an empty response
log-big | number | 0 | but for those with a response of so many bytes
stats stats-server | word | | give the state of the workers as JSON here
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
show-config | flag | false | print each line and what becomes of it, and exit
check | flag | false | look for all that would stop a start, load the application, exit
'''

# uWSGI's options that need no switch here: names, reason. A * stands for any end of name=value.
NOT_NEEDED = '''
need-app | a start without an application fails
enable-threads -T | the application's threads just run
single-interpreter -i | there is one interpreter
thunder-lock lock-engine ftok persistent-ipcsem | the kernel wakes one worker for a connection
buffer-size -b http-buffer-size max-vars -v response-headers-limit | a head may have 64 KiB
ignore-sigpipe ignore-write-errors disable-write-exception write-errors-* | a client that leaves is no error
close-on-exec close-on-exec2 | no socket is inherited by what the application starts
no-orphans | workers end when the master dies
hook-master-start=unix_signal:15* | SIGTERM is a graceful stop
plugin=python* plugins=python* plugin=http* plugins=http* plugin=cgi* plugins=cgi* plugin=psgi* plugins=psgi*
    plugin=rack* plugins=rack* need-plugin=python* need-plugins=python* plugins-dir plugin-dir autoload | built in
log-master log-master-* threaded-logger | a line is one write, whoever writes it
harakiri-verbose harakiri-graceful-signal harakiri-no-arh no-harakiri-* py-tracebacker backtrace-depth
    | harakiri logs the stack
cheaper-busyness-* cheaper-algos-list cheaper-algo-list | see cheaper-algo: spare or backlog
http-keepalive | connections are kept, for http-timeout
log-reopen | the log follows its name
post-buffering post-buffering-bufsize | a body is read when the application asks for it
memory-report -m | stats has the memory of each worker
wsgi-strict wsgi-env-behavior wsgi-env-behaviour wsgi-disable-file-wrapper | WSGI is as PEP 3333 says
http-auto-chunked http-chunked-input http-raw-body http-manage-expect chunked-input-* http-processes http-workers
    http-cheap http-events http-quiet http-harakiri http-connect-timeout http-uid http-gid
    | the workers speak HTTP/1.1 themselves, there is no router process
http-headers-timeout so-send-timeout so-write-timeout socket-send-timeout socket-write-timeout
    | socket-timeout holds for it
tcp-nodelay no-defer-accept no-fd-passing skip-zero disable-sendfile honour-stdin http-server-name-as-http-host
    drop-after-init | it is so, or the server does what fits
py-call-osafterfork py-call-uwsgi-fork-hooks | os.register_at_fork() works
no-default-app | what is not mounted is answered with 404
check-interval forkbomb-delay max-apps mem-collector-freq min-worker-lifetime | there is no such limit
stats-min stats-minified stats-no-* metrics-no-cores | stats is short
cheaper-list loop-list loops-list clock-list clocks-list plugin-list plugins-list logger-list loggers-list alarm-list
    alarms-list imperial-monitor* | nothing is pluggable
'''

# uWSGI's options that aren't supported: names, what to use instead.
NOT_SUPPORTED = '''
attach-daemon* attach-control-daemon smart-attach-daemon* daemons-honour-stdin | a systemd unit each
cron* unique-cron* unique-legion-cron timer rbtimer signal-timer signal-rbtimer | a systemd timer or cron
mule* farm spooler* -Q touch-mules-reload touch-spoolers-reload | celery, rq or a systemd unit
hook-* exec-* call-* mount-* umount-* worker-mount after-request-* file-write touch-exec wait-* check-mount*
    mountpoint-check | ExecStartPre= of the systemd unit, or a start script
gevent* async ugreen* loop greenlet asyncio tornado | threads; for async code an ASGI server
websocket* http-websockets | an ASGI server beside it
cache* add-cache-item load-file-in-cache* check-cache static-cache-* queue* sharedarea -A py-sharedarea
    | nginx's proxy cache, redis or memcached
route* error-route* final-route* response-route* collect-header pull-header response-header-collect del-header
    rem-header error-page-* error-page vhost* http-var http-to-https | nginx's location, rewrite and add_header
enable-proxy-protocol http-enable-proxy-protocol | nginx's proxy_protocol
https* ssl-* sni* suwsgi-socket | nginx for TLS
http-* fastrouter* rawrouter* sslrouter* forkptyrouter* corerouter* subscri* unsubscribe-* start-unsubscribed st
    multicast* zerg* weight auto-weight | nginx's upstream
fastcgi-* scgi-* raw-* puwsgi-socket udp remap-modifier allowed-modifiers cgi-mode | the uwsgi protocol or HTTP
abstract-socket -a | socket = @name
shared-socket undeferred-shared-socket map-socket reuse-port | socket; all workers accept from it
emperor* vassal* early-emperor heartbeat notify-socket | one systemd unit for each site
legion* lord* | keepalived
alarm* log-alarm lq-alarm backlog-alarm listen-queue-alarm segfault-alarm | monitor stats and the log
log-route log-req-route log-encoder log-req-encoder log-prefix log-syslog log-socket rsyslog-* logfile-* log-truncate
    touch-log* | log-format and logger; journald or logrotate for the rest
log-ioerror log-sendfile | log-4xx, log-5xx, log-slow
cheap | cheaper = 1, or socket activation with die-on-idle
log-micros log-format-strftime logformat-strftime | log-format with %(micros), %(ltime)
metric* enable-metrics carbon* rrdtool* snmp* stats-push* nagios | an exporter that reads stats
master-fifo fs-reload fs-brutal-reload fs-signal touch-signal signal* | touch-reload, or kill -HUP
harakiri-queue-threshold cheaper-rss-limit-* | harakiri, reload-on-rss
reload-on-exception* reload-on-fd brutal-reload-on-fd catch-exceptions exception-handler | the log
exit-on-reload shutdown-sockets propagate-touch reload-os-env | kill -TERM
master-as-root immediate-uid immediate-gid add-gid no-initgroups drop-after-apps | uid and gid
chroot pivot-root pivot_root refork* re-fork* unshare* namespace* ns ns-net setns* jailed tuntap* cgroup* limit-nproc
    prio cpu-affinity never-swap ksm | the systemd unit, or a container
optimize -O no-site py-programname py-program-name py-executable py-sys-executable python-version config-py
    | options of the python3 that starts minuwsgi
py python eval pyrun pyshell* web3* pump* wsgi-lite* pecan paste* ini-paste* symcall* pymodule-alias dlopen
    post-pymodule-alias shared-import shared-py* python-raw python-worker-override py-auto-reload-ignore test -J
    thread-stack* threads-stack* | a small wsgi-file that does it
wsgi-accept-buffer wsgi-accept-buffers start_response-nodelay | bytes, see PEP 3333
php* ruby* rbrequire lua* perl* jvm* mono* v8* go-* glusterfs* gridfs* rados* webdav* xslt* ldap*
    | the language's own server, or `cgi`
static-map-* static-expires-* static-gzip-* static-skip-ext file-serve-mode fileserve-mode mime-file mimefile
    honour-range check-static-docroot upload-progress | nginx for more than plain files
xml xmlconfig yaml yml json js -x -y -j | an INI file
blacklist end-blacklist whitelist end-whitelist declare-option* fallback-config inject-* resolve get | plain options
plugin plugins need-plugin need-plugins build-plugin* dot-h cflags | nothing is pluggable
stop reload pause suspend resume help -h usage version | the command line: --stop, --reload, --help, --version
envdir early-envdir unenv | env, or the environment of the systemd unit
flock* | the pidfile is a lock
cgi-* | cgi-helper, cgi-index, cgi-allowed-ext, cgi-timeout
freebind so-keepalive socket-sndbuf socket-rcvbuf tcp-fast* | net.* of sysctl
ignore-script-name | nginx's uwsgi_param SCRIPT_NAME ''
ping* reaper -r safe-fd fd-safe no-server no-threads-wait body-read-warning command-mode force-* clock locks rpc-max
    profiler mode extract connect-and-read dump-options print-sym* binary-* binsh privileged-* unprivileged-*
    skip-atexit* use-abort -c | nothing, it is left out
'''

# Lines that stray into a uwsgi.ini: names, remark.
STRANGERS = '''
<<<<<<<* ======* >>>>>>>* |||||||* | is a mark of a merge conflict: choose one side
autostart autorestart redirect_stderr command stdout_logfile* stderr_logfile* startsecs startretries stopwaitsecs
    stopsignal stopasgroup killasgroup numprocs process_name | belongs to supervisord
user group directory environment | belongs to supervisord or systemd; here it's uid, gid, chdir, env
uwsgi_* proxy_* server_name location upstream server access_log error_log client_max_body_size root alias
    | belongs to nginx
ExecStart* Restart* WantedBy Type KillSignal WorkingDirectory User Group After | belongs to a systemd unit
use paste.* [* | belongs to PasteDeploy or another program
'''


def rows(table):
    return table.strip().replace('\n    ', ' ').split('\n')


BOOLEANS = {'true': True, 'yes': True, 'on': True, '': True, 'false': False, 'no': False, 'off': False}

# Kinds of values: what is expected, the conversion (or a ValueError), what must hold of its result.
KINDS = {
    'flag': ('true or false', lambda text: BOOLEANS.get(text.lower(), text != '0'), None),     # all else means yes
    'number': ('a whole number', int, lambda number: 0 <= number < 1 << 43),
    'positive': ('a whole number greater than 0', int, lambda number: number > 0),
    'seconds': ('a number of seconds', lambda text: float(text) if '.' in text else int(text),
                lambda time: 0 <= time < 1e9),
    'octal': ('an octal mode such as 660', lambda text: 0o666 if text == '1' or BOOLEANS.get(text.lower()) else
              int(text, 8), lambda mode: 0 <= mode <= 0o777),
    'protocol': ('uwsgi or http', lambda text: text.replace('http11', 'http'), lambda name: name in ('uwsgi', 'http')),
    'path': ('a path', str, None),
    'word': ('a name or an address', str, None),
    'pair': ('name=value', str, lambda pair: pair.find('=') > 0),
    'text': ('any text', str, None),
    'network': ('an address or a network such as 10.0.0.0/8',
                lambda text: __import__('ipaddress').ip_network(text, strict=False), None)}


class Option:
    """A row of OPTIONS."""

    def __init__(self, row):
        names, self.kind, default, self.meaning = (cell.strip() for cell in row.split('|'))
        self.names = names.split()
        self.name, self.attribute = self.names[0], self.names[0].replace('-', '_')
        self.kind, self.many = self.kind.rstrip('+'), self.kind[-1] == '+'
        self.expected, self.convert, self.allowed = KINDS[self.kind]
        self.default = () if self.many else self.convert(default) if default else None


ROWS = [Option(row) for row in rows(OPTIONS) if '|' in row]
BY_NAME = {name: option for option in ROWS for name in option.names}


def glob_sorted(pattern):
    import glob
    return sorted(glob.glob(pattern))


def leading_number(value):
    """As C's atoi(): the digits at the front, or 0."""
    digits = ''.join(itertools.takewhile(str.isdecimal, value.lstrip('-')))
    return int(digits[:18] or '0') * (-1 if value[:1] == '-' else 1)


def substitute(opening, value, replacement):
    """Replace each opening...) (parentheses balanced) by replacement(...); None leaves it as it is."""
    out, at = '', 0
    while (start := value.find(opening, at)) >= 0:
        end, depth = start + len(opening), 1
        while depth and end < len(value):
            depth += {'(': 1, ')': -1}.get(value[end], 0)
            end += 1
        if depth:
            break
        new = replacement(value[start + len(opening):end - 1])
        out += value[at:start] + (value[start:end] if new is None else new)
        at = end
    return out + value[at:]


NOT_RUN = '@({}): only files can be read, nothing is run; set a variable before the start and use $(VARIABLE)'


def read_file(name, refusal="can't read {}: only files can be read"):
    """The content of a file, less one line end."""
    if '://' in name:
        raise ConfigError(refusal.format(name))
    try:
        with open(name, encoding='utf-8-sig', errors='surrogateescape') as file:
            return file.read().removesuffix('\n')
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {name}: {getattr(error, 'strerror', None) or error}") from None


def magic(*places):
    """What %n, %d, %k … stand for. Places: (file, section) of the first file (upper case) and of the one at hand."""
    import grp
    import pwd
    uid, gid = os.getuid(), os.getgid()
    values = {'b': os.path.abspath(__file__), 'v': os.getcwd(), 'V': __version__, 'h': socket.gethostname(),
              'k': os.cpu_count(), 't': int(time.time()), 'T': int(time.time() * 1e6), 'u': uid, 'g': gid,
              'U': uid, 'G': gid, '[': '\33', '\0': '%'}
    with contextlib.suppress(KeyError):                 # a container's user may have no name
        values['U'], values['G'] = pwd.getpwuid(uid)[0], grp.getgrgid(gid)[0]
    for (file, section), case in zip(places, (str.upper, str)):
        path, digest = os.path.abspath(file), 5381
        for byte in os.fsencode(path):
            digest = digest * 33 & 0xffffffff ^ byte
        directory, base = os.path.split(path)
        stem, extension = os.path.splitext(base)
        its = {'o': file, 'p': path, 's': base, 'n': stem, 'e': extension[1:], 'd': directory.rstrip('/') + '/',
               'c': os.path.basename(directory), 'x': '' if section == 'uwsgi' else section,
               'i': os.stat(file).st_ino, 'j': digest.to_bytes(4, 'little').hex().upper()}
        values.update((case(letter), value) for letter, value in its.items())
    return {**values, **dict(zip('0123456789', directory.strip('/').split('/') + [''] * 10))}


RELOADED = 'MINUWSGI_RELOAD'            # the variable that hands state to the new image (part 13)

# What `if-file = X` and the like ask of X; what `if-env` and `if-opt` find is the text for %(_).
TESTS = {'file': os.path.isfile, 'dir': os.path.isdir, 'directory': os.path.isdir, 'exists': os.path.exists,
         'hostname': lambda name: socket.gethostname() == name, 'reload': lambda _: RELOADED in os.environ,
         'plugin': lambda name: name.startswith(('python', 'http', 'cgi')), 'env': os.environ.get, 'opt': None}
CONDITIONS = {prefix + test: (prefix, test) for test in TESTS for prefix in ('if-', 'if', 'if-not-')}
LOOPS = {'for': str.split, 'for-glob': glob_sorted, 'for-readline': lambda name: read_file(name).split('\n'),
         'for-times': lambda times: [str(i + 1) for i in range(min(leading_number(times), 10000))]}
BLOCKS, ENDS = {*CONDITIONS, *LOOPS}, {'endif', 'end-if', 'endfor', 'end-for', 'end'}


def fate(name, value=''):
    """(fate, reason): what becomes of a line."""
    if name in BY_NAME or name in BLOCKS or name in ENDS or name == 'exit':
        return 'used', ''
    for kind, table in ('always', NOT_NEEDED), ('unsupported', NOT_SUPPORTED), ('unknown', STRANGERS):
        for row in rows(table):
            patterns, _, reason = row.rpartition(' | ')
            for pattern in patterns.split():
                if name == pattern or pattern[-1] == '*' and f'{name}={value}'.startswith(pattern[:-1]):
                    return kind, reason
    return 'unknown', ''


def describe_unknown(name, value=''):
    """What to say of a line that is no option."""
    stranger = fate(name, value)[1]
    if stranger:
        return f"'{name or '=' + value}' {stranger}"
    if '{{' in name or '{%' in name:
        return f"'{name}' is a template that wasn't filled in"
    first, _, rest = name.partition(' ')
    if rest and fate(first)[0] != 'unknown':
        return f"'{name}' is no option; is a = missing? {first} = {rest}{value and '='}{value}"
    import difflib
    known = [row.split('|')[0].split() for row in rows(OPTIONS + NOT_NEEDED + NOT_SUPPORTED) if '|' in row]
    names = [n for row in known for n in row if n[0] != '-' and n[-1] != '*']
    meant = ([row[0] for row in known if '-' + name in row] or difflib.get_close_matches(name, names, 1, 0.75)
             or [n for n in names if n.startswith(name + '-')])
    return f"unknown option '{name}'" + (f", did you mean '{meant[0]}'?" if meant else '')


COMMAND_LINE = 'command line'


def target(argument):
    """The option that an argument without a name is the value of, or None."""
    if argument.endswith('.ini') or '.ini:' in argument:
        return 'ini'
    if argument.endswith(('.py', '.wsgi')):
        return 'wsgi-file'
    return 'module' if ':' in argument[1:] and '/' not in argument and not argument[-1].isdigit() else None


def command_line(arguments):
    """Arguments as lines: options (--name value, --name=value, -x value), then files and module:callable."""
    rest, lines, targets = list(arguments), [], []
    while rest:
        argument = rest.pop(0)
        if target(argument) and argument[0] != '-':
            targets.append((target(argument), argument, COMMAND_LINE))
            continue
        name, equals, value = argument[2:].partition('=')
        if argument[:2] != '--':
            name, equals, value = argument[:2], argument[2:], argument[2:].lstrip('=')
        begun = {option for known, option in BY_NAME.items() if known.startswith(name.replace('_', '-'))}
        option = begun.pop() if len(begun) == 1 else BY_NAME.get(name)              # as getopt_long() allows
        optional = not option or option.kind == 'octal'
        if argument[:1] != '-':
            raise ConfigError(f'command line: what is {argument!r}? A .ini or .py file or module:callable is expected; '
                              'options begin with --')
        if not option and fate(name)[0] == 'unknown':
            raise ConfigError(f'command line: {argument}: {describe_unknown(name)}; see --help')
        if not equals and not (option and option.kind == 'flag'):
            if rest and rest[0][:1] != '-' and not (optional and target(rest[0])):
                value = rest.pop(0)
            elif not optional:
                raise ConfigError(f'command line: {argument} needs a value: {option.expected}')
        lines.append((option.name if option else name, value, COMMAND_LINE))
    return lines + targets


def is_secret(name):
    return any(part in name.lower() for part in ('pass', 'secret', 'key', 'token', 'credential', 'dsn'))


class Setting:
    """One line of the configuration, its fate, and what there is to say of it."""

    def __init__(self, name, value, where):
        self.name, self.value, self.where = name, value, where
        self.fate, self.reason = fate(name, value)
        self.warnings, self.errors = [], []

    def strip_comment(self):
        """uWSGI keeps a comment after a value as a part of it, which is never meant."""
        blank = f' {self.value} '.replace('\t', ' ')
        at = min(f'{blank};'.find(' ;'), f'{blank}#'.find(' #'))
        if at < len(self.value) and not is_secret(self.name):
            self.warnings.append(f'{self.name}: a comment needs a line of its own, {self.value[at:]!r} is left out')
            self.value = self.value[:at].rstrip()

    def told(self, texts):
        """Texts about it, without a secret."""
        secret = self.value and (self.name == 'env' or is_secret(self.name))
        return [text.replace(self.value, '***') if secret else text for text in texts]


def doubts(value):
    """What uWSGI takes literally and nobody means."""
    if value[:1] in ('"', "'") and value[-1:] == value[:1]:
        yield 'the quotes are a part of the value; leave them out'
    if '{{' in value or '{%' in value or '<%' in value:
        yield "a template that wasn't filled in"
    elif '$(' in value:
        yield f'{value}: there is no such variable in the environment'
    elif '$' in value:
        yield f'{value}: variables of the environment are written $(NAME)'


class Config:
    """The options as attributes (- becomes _)."""

    def __init__(self, arguments):
        self.settings, self.files = [], []              # all lines in order; (file, section) of all that was read
        self.variables, self.setters = set(), {}        # names in a %(...); option -> the setting that set it
        for option in ROWS:
            setattr(self, option.attribute, option.default)
        self.take((name[6:].lower().replace('_', '-'), value, f'environment {name}')
                  for name, value in os.environ.items() if name.startswith('UWSGI_'))
        self.take(command_line(arguments))
        for setting in self.settings:                   # it may grow
            if setting.name == 'inherit':
                self.attempt(self.read_ini, setting)
        for setting in sorted(self.settings, key=lambda setting: setting.where == COMMAND_LINE):    # it wins
            self.judge(setting)
            self.attempt(self.use, setting)
        self.warnings = list(dict.fromkeys(f'{s.where}: {text}' for s in self.settings for text in s.told(s.warnings)))
        self.errors = list(dict.fromkeys(f'{s.where}: {text}' for s in self.settings for text in s.told(s.errors)))
        if self.strict:
            self.errors += [f'{s.where}: {s.reason} (strict)' for s in self.settings if s.fate == 'unknown']
        files = [target.partition('file:')[2] for target in self.logger if 'file:' in target]
        self.logto = self.daemonize or self.logto or (files[-1] if files else None)
        if self.logto:
            self.logto = os.path.abspath(self.logto)    # before chdir, as in uWSGI
        if self.processes * self.threads > 10000:
            self.errors.append(f'processes = {self.processes}, threads = {self.threads}: 10000 in all are the most')
        self.req_logger = [os.path.abspath(to.partition('file:')[2]) for to in self.req_logger if 'file:' in to]

    def where(self, value):
        """'site.ini:3: ' for a value that stands in a line, for messages."""
        return next((f'{s.where}: ' for s in self.settings if s.value == value and s.fate == 'used'), '')

    def attempt(self, action, setting, *rest):
        try:
            action(setting, *rest)
        except ConfigError as error:
            if setting.where == COMMAND_LINE:
                raise
            (setting.errors if setting.fate == 'used' else setting.warnings).append(str(error))

    def take(self, lines):
        """Take lines (name, value, where); what steers the reading acts at once."""
        lines = iter(lines)
        for line in lines:
            self.settings.append(Setting(*line))
            self.attempt(self.obey, self.settings[-1], lines)

    def obey(self, setting, lines):
        name, option = setting.name, BY_NAME.get(setting.name)
        if setting.fate in ('used', 'unknown') and name != 'env' and not (option and option.kind == 'text'):
            setting.strip_comment()
        if name in BLOCKS:
            self.take_block(setting, lines)
        elif option is BY_NAME['ini']:
            self.read_ini(setting)
        elif option is BY_NAME['set']:
            key, _, value = setting.value.partition('=')
            self.take([(key.strip(), value.strip(), setting.where)])
            if name != 'set':
                self.variables.add(key.strip())
        elif name == 'exit':
            raise ConfigError(f'the configuration says exit {setting.value}'.rstrip())

    def take_block(self, setting, lines):
        """Take the lines up to the end of an if or for: as often as there are texts for %(_)."""
        body, end = [], []
        for line in lines:
            if line[0] in ENDS:
                end = [line]
                break
            if line[0] in BLOCKS:
                setting.errors.append(f'{line[0]} within another block: there are no nested blocks')
            else:
                body.append(line)
        else:
            setting.warnings.append('a block has no end; it ends with the file')
        for text in self.texts_of_block(setting):
            self.take((name, value.replace('%(_)', text), where) for name, value, where in body)
        self.take(end)

    def texts_of_block(self, setting):
        value = self.fill(setting.value)
        if setting.name in LOOPS:
            return LOOPS[setting.name](value)
        prefix, test = CONDITIONS[setting.name]
        subject, equals, wanted = (part.strip() for part in value.partition('='))
        if test == 'opt':
            self.variables.add(subject)
        found = (TESTS[test] or self.first)(subject)
        held = found not in (None, False) and (not equals or found == wanted)
        if held == (prefix == 'if-not-'):
            setting.reason = 'not so: the lines of the block are left out'
            return []
        return ['%(_)' if not held else subject if found is True else found]

    def read_ini(self, setting):
        """Take the section [uwsgi] of a file, or another: file:section, :section (of the last file)."""
        file, section = self.fill(setting.value), 'uwsgi'
        if not os.path.exists(file) and ':' in file and '://' not in file:
            file, _, section = file.rpartition(':')
            file = file or (self.files[-1][0] if self.files else '')
        if (file, section) in self.files:
            setting.warnings.append(f'{file}:{section} was read already')
            return
        text = read_file(file)
        self.files.append((file, section))
        values = magic(self.files[0], self.files[-1]) if '%' in text else {}
        lines, sections = [], []
        for number, line in enumerate(text.split('\n'), 1):
            before, *rest = line.replace('%%', '%\0').split('%')
            for part in rest:                           # an unknown one stays (uWSGI drops it)
                before += str(values.get(part[:1], '%' + part[:1])) + part[1:]
            line = before.strip()
            substitute('%(', line, self.note_variables)
            if line[:1] == '[':
                sections.append(line[1:].partition(']')[0].strip())
            elif line and line[0] not in ';#' and sections[-1:] == [section]:
                name, _, value = line.partition('=')
                lines.append((name.strip(), value.strip(), f'{file}:{number}'))
        if section not in sections:
            others = ', '.join(f'{file}:{name}' for name in dict.fromkeys(sections))
            setting.warnings.append(f'{file}: there is no section [{section}], so nothing is taken from it; '
                                    + (f'try {others}' if others else 'it has no section at all'))
        self.take(lines)

    def note_variables(self, names):
        self.variables.update(names.replace('(', ' ').replace(')', ' ').split())

    def first(self, name):
        return next((setting.value for setting in self.settings if setting.name == name), None)

    def fill(self, value, within=()):
        """Fill in $(ENV), @(file) and %(name), in uWSGI's order; what isn't known stays as it is."""
        value = substitute('$(', value, os.environ.get)
        value = substitute('@(', value, lambda name: read_file(name, NOT_RUN))
        return substitute('%(', value, lambda expression: self.compute(expression, within))

    def compute(self, expression, within):
        """The text for %(name); %(a b) joins, %(a + b) computes, strictly from left to right. A name stands for the
        value of its first line; what is unknown is skipped; None if all is."""
        expression = substitute('(', expression, lambda inner: self.compute(inner, within))
        result = operator = None
        for token in expression.replace('++', '+ 1').replace('--', '- 1').split():
            text = token if token.isdecimal() else None if token in within else self.first(token)
            if token in ('+', '-', '*', '/'):
                operator = token
            elif text is not None:
                text = self.fill(text, (*within, token))
                a, b = leading_number(result or ''), leading_number(text)
                if operator and result is not None:
                    result = str({'+': a + b, '-': a - b, '*': a * b, '/': int(a / (b or math.inf))}[operator])
                    operator = None
                else:
                    result = (result or '') + text
        return result

    def judge(self, setting):
        """The final fate of a line."""
        dashed = setting.name.replace('_', '-')
        if setting.fate == 'unknown' and (setting.name in self.variables or setting.where.startswith('environment')):
            setting.fate, setting.reason = 'variable', ''
        elif setting.fate == 'unknown' and fate(dashed)[0] != 'unknown':
            setting.warnings.append(f"'{setting.name}' is written '{dashed}'")
            setting.name, (setting.fate, setting.reason) = dashed, fate(dashed, setting.value)
        if setting.fate == 'unknown':
            setting.reason = describe_unknown(setting.name, setting.value)
            setting.warnings.append(setting.reason)
        elif setting.fate == 'unsupported':
            setting.warnings.append(f"'{setting.name}' isn't supported; instead: {setting.reason}")

    def use(self, setting):
        """Set the attribute. What uWSGI reads otherwise than it is meant gets a warning, never a start refused."""
        name, option = setting.name, BY_NAME.get(setting.name)
        value = setting.value = self.fill(setting.value, (name,))
        if not option:
            return
        expected, boolean = f'{option.expected} is expected', value.lower() in BOOLEANS
        if option.kind != 'text':
            setting.warnings += [f'{name}: {doubt}' for doubt in doubts(value)]
        if option.kind in ('path', 'word') and boolean:
            taken = f'taken as {value}' if value else 'it is empty and left out'
            setting.warnings.append(f'{name} = {value}: {expected}; {taken}')
            if not value:
                return
        try:
            result = option.convert(value)
        except ValueError:
            if option.kind not in ('number', 'positive', 'seconds') or not (boolean or value[:1].isdecimal()):
                return setting.errors.append(f"'{name} = {value}': {expected}")
            result = leading_number(value) or (option.default if option.kind == 'positive' else 0)
            setting.warnings.append(f'{name} = {value}: {expected}; taken as {result}')
        if option.allowed and not option.allowed(result):
            return setting.errors.append(f"'{name} = {value}': {expected}")
        if option.many:
            result = (*getattr(self, option.attribute), result)
        elif option in self.setters:
            self.setters[option].reason = f'{setting.where} overrides it'
        self.setters[option] = setting
        setattr(self, option.attribute, result)


def show_config(config):
    """Print each line of the configuration: its fate, name = value, where it stands, a remark. No secrets."""
    variables = [item.partition('=')[::2] for item in config.env] + list(os.environ.items())
    variables += [(setting.name, setting.value) for setting in config.settings if setting.fate != 'used']
    secrets = [value.strip() for name, value in variables if is_secret(name) and len(value) > 5]
    sys.stdout.reconfigure(errors='backslashreplace')
    for setting in config.settings:
        value, (name, equals, _) = setting.value, setting.value.partition('=')
        if setting.name == 'env' or equals and setting.name.startswith('set') and is_secret(name):
            value = f'{name}=***' if equals else '***'
        elif setting.fate != 'used' and is_secret(setting.name):
            value = '***'
        said = setting.told(setting.warnings + setting.errors) if setting.fate in ('used', 'variable') else []
        remark = '; '.join(filter(None, [*said, setting.reason]))
        line = f'{setting.fate:12}{setting.name} = {value}  ({setting.where})  {remark}'.rstrip()
        for secret in secrets:
            line = line.replace(secret, '***')
        print(line.replace('\n', '\\n'))
    sys.stdout.flush()


def usage():
    lines = [__doc__.split('\n\n')[0], 'minuwsgi.py [FILE.ini[:SECTION] | FILE.py | MODULE:CALLABLE] [OPTION …]']
    for row in rows(OPTIONS):
        option = BY_NAME.get(row.split()[0])
        if '|' not in row:
            lines.append(f'{row}:')
        elif option.meaning.startswith('the same'):
            lines[-1] += f'; --{option.name}'
        else:
            short = [name for name in option.names if name[0] == '-']
            name = ', '.join([f'--{option.name}', *short]) + ' V' * (option.kind != 'flag')
            lines.append(f'  {name:26} {option.meaning}' + (f' [{option.default}]' if option.default else ''))
    return '\n'.join(lines) + """
Commands:
  --stop PIDFILE, --reload PIDFILE   send SIGTERM, SIGHUP to the master
  --curl SOCKET [PATH]               ask a uwsgi server and print its answer
  --version, --help
"""


# ---------------------------------------------------------------------------------------------
# 2. Waiting, and the log
#
# Nobody waits here without a bound: it is poll(2) with a time, or RWF_NOWAIT, which saves even that.
#
# Everything that is logged goes to descriptor 2, which `logto` puts on a file. One line is one
# os.write(), so that the lines of many processes don't mix. A log that can't be written (disk full,
# pipe closed, or full because nobody reads it) is no reason to stop serving: lines are lost then, and
# counted. O_NONBLOCK would hold for other programs that share the descriptor too.

log_date = []                           # of the option log-date: the format of strftime(), or nothing


def ready_within(fd, event, seconds):
    """Does an event come to a descriptor within so many seconds? Hang-ups and errors are events always."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(seconds * 1000))


def nowait_flag():
    """RWF_NOWAIT where preadv() takes it for sockets (Linux 6.5), else 0. See preadv2(2).

    With it, reading from a blocking socket fails instead of waiting: no call is needed to make each
    connection non-blocking (-0.4 us)."""
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


class Log(io.FileIO):
    """A descriptor for lines, which holds nobody for longer than a second in ten. Lies under sys.stdout and
    sys.stderr too: an application that prints should neither wait for the log nor fail with it."""

    impatient_until = 0.0               # of all: one that is stuck is enough

    def __init__(self, fd):
        super().__init__(fd, 'w', closefd=False)
        self.fd, self.lost = fd, 0
        self.look()

    def look(self):
        """What is behind the descriptor now? Only a file never makes us wait."""
        self.put = os.write if os.path.isfile(self.fd) else write_now

    def write(self, line):
        left = b'\nlog: %d lines were lost here: it could not be written\n' % self.lost + line if self.lost else line
        try:
            while left:
                try:
                    left = left[self.put(self.fd, left):]
                except BlockingIOError:
                    self.wait()
            self.lost = 0
        except OSError:
            self.lost += 1
        return len(line)

    def wait(self):
        if time.monotonic() < Log.impatient_until or not ready_within(self.fd, select.POLLOUT, 1):
            Log.impatient_until = time.monotonic() + 10
            raise BlockingIOError


while (spare := os.open(os.devnull, os.O_RDWR)) < 3:    # closed at the start: no socket should take the log's place
    pass
os.close(spare)
main_log = Log(2)


def log(message):
    date = time.strftime(log_date[0]) + ' - ' if log_date else ''
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
    import traceback
    log(f'{message}\n{traceback.format_exc().rstrip()}')


def flush_streams():
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError, ValueError, AttributeError):          # an application may have closed them
            stream.flush()


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


def open_log(name):
    """Let the descriptors 1 and 2 write to the end of a file."""
    fd = open_to_append(name)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    main_log.look()


def mtime(name):
    try:
        return os.stat(name).st_mtime_ns
    except OSError:
        return None


def reopen_log(config):
    """Follow the log's name to a new file, after somebody (logrotate) moved the old one."""
    if config.logto and not config.logto.startswith('/dev/'):
        try:
            if not os.path.exists(config.logto) or not os.path.samefile(config.logto, 2):
                open_log(config.logto)
        except (ConfigError, OSError) as error:         # the old file goes on
            log(f'log: {error}')


def rotate_log(config):
    """log-maxsize: move the log away when it is too large."""
    if config.logto and os.fstat(2).st_size > config.log_maxsize:
        try:
            os.rename(config.logto, config.log_backupname or f'{config.logto}.{int(time.time())}')
        except OSError as error:
            config.log_maxsize = 0
            log(f"log-maxsize: can't rename {config.logto}: {error.strerror}")
        reopen_log(config)


# ---------------------------------------------------------------------------------------------
# 3. Sockets
#
# The master binds, the workers accept: all of them inherit the same listening socket, and the
# kernel gives each connection to one of them. A unix socket has its mode from the first moment
# (umask round bind), and its file is removed only while it is still ours (device and inode), as
# another server may have taken the name over.

LISTEN_MAX = 1 << 30                    # so many connections may wait: the kernel cuts silently, see listen(2)
with contextlib.suppress(OSError), open('/proc/sys/net/core/somaxconn') as somaxconn:
    LISTEN_MAX = int(somaxconn.read())


def vacuum(config, owned):
    """The option vacuum: remove the files of listeners, pidfile and the like, None for what there isn't."""
    for one in owned if config.vacuum else ():
        if one is not None:
            one.vacuum()


def owner(names):
    """(uid, gid) for 'user', 'user:group' or ':group', by name or number; -1 leaves one as it is."""
    import grp
    import pwd
    user, _, group = names.partition(':')
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid if user else -1
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid if group else -1
    except KeyError:
        raise ConfigError(f"{names.strip(':')}: there is no such user or group") from None
    return uid, gid


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
    elif colon and port.isdecimal() and int(port) < 65536:
        return 'tcp', (host.strip('[]'), int(port))
    elif colon:
        why = f'{port!r} is no port (0 to 65535); write host:port or :port'
    elif not os.path.isdir(os.path.dirname(path)):
        why = f'there is no directory {os.path.dirname(path)}'
    else:
        return 'unix', path
    raise ConfigError(f"can't bind {address}: {why}")


def holder(probe):
    """Who listens at the other end of a connected unix socket, see unix(7) on SO_PEERCRED."""
    pid = command = '?'
    with contextlib.suppress(OSError, AttributeError):          # no /proc, or not Linux
        pid = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
        with open(f'/proc/{pid}/cmdline', errors='replace') as file:
            command = file.read(200).replace('\0', ' ').strip()
    return f'pid {pid} ({command})'


def remove_stale_socket(path):
    """Make way for bind(): remove a socket that nobody listens on, and nothing else."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError("there is a file of that name that isn't a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise FileExistsError(f'another server listens there, {holder(probe)}; stop it, or choose another name')


class Listener:
    """A listening socket. protocol: 'uwsgi' or 'http'.  fd, inode: of one that is inherited, and isn't bound again."""

    def __init__(self, address, protocol, config, fd=None, inode=None):
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
            self.socket.listen(min(config.listen, LISTEN_MAX))
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't bind {address}: {getattr(error, 'strerror', None) or error}") from None
        self.find_name()

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
        status = os.lstat(path)
        self.inode = status.st_dev, status.st_ino
        if config.chown_socket or config.uid or config.gid:             # of a link itself, if somebody put one there
            os.lchown(path, *owner(config.chown_socket or f'{config.uid or ""}:{config.gid or ""}'))

    def bind_tcp(self, host, port):
        found = socket.getaddrinfo(host or '0.0.0.0', port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, where = found[0]
        self.socket = socket.socket(family, kind)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # what it accepts inherits this
        if self.protocol == 'uwsgi' and hasattr(socket, 'TCP_DEFER_ACCEPT'):    # its bytes are there then
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 4)
        self.socket.bind(where)

    def find_name(self):
        """Its name for the log and the environ, as the kernel knows it: a path, b'\\0name' or (host, port, ...)."""
        where = self.socket.getsockname()
        if type(where) is not tuple:
            self.name, self.host, self.port = os.fsdecode(where).replace('\0', '@'), 'localhost', '80'
            return
        self.host, self.port = f'[{where[0]}]' if ':' in where[0] else where[0], str(where[1])
        self.name = f'{self.host}:{self.port}'
        if self.protocol == 'uwsgi' and not f'{where[0]}.'.startswith(('127.', '::1.')):
            log(f'warning: {self.name} believes whoever reaches it, as the uwsgi protocol has it (REMOTE_ADDR, '
                'REMOTE_USER …): let a firewall admit the web server alone, or bind 127.0.0.1 or a path')

    def vacuum(self):
        """Remove the socket's file if it is still the one that was bound here."""
        with contextlib.suppress(OSError):
            status = os.lstat(self.name)
            if (status.st_dev, status.st_ino) == self.inode:
                os.unlink(self.name)


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
SCHEME = frozenset(('HTTPS', 'REQUEST_SCHEME', 'UWSGI_SCHEME'))
UNPLANNED = UNWANTED | {'HTTP_TRANSFER_ENCODING'}


def set_scheme(environ):
    """wsgi.url_scheme from what the web server says of its client's connection."""
    https = environ.get('HTTPS', '').lower() in ('on', '1', 'true', 'https')
    environ['wsgi.url_scheme'] = environ.get('UWSGI_SCHEME') or (
        'https' if https else environ.get('REQUEST_SCHEME') or 'http')


class Expected:
    """What the next packet looks like, guessed from an earlier one: -4 us of 14 for each request. Core.serve()
    compares packets with `plan`; here it is made (learn_order), and what doesn't fit it is read (rest).

    A web server sends its variables in the same order each time. So a plan has, for each variable that
    changes, a piece (raw, size, name): the text in front of its value, to be compared at once instead
    of reading a length and looking up a name. Variables that stay the same are a part of the next raw,
    with their value, which is in the plan's template already. What comes before the REQUEST_URI of a
    GET without a query is one text, `start`. Nothing is believed unseen: from the first piece that
    isn't there, rest() reads the block without a guess."""

    def __init__(self, base):
        self.base = base                                # the environ without the web server's variables
        self.names = {}                                 # size's high byte + name -> name
        # start (or None) and where it ends, what gives the environ up to there, the pieces after it; for other
        # packets what gives the environ, and all pieces; how many variables. No text is equal to 'nothing'.
        self.plan = None, 4, base.copy, (), base.copy, (('nothing', 0, ''),), 0
        self.skipped = {}                               # raw -> (variables before it, constants in it and after it)
        self.countdown = 0

    def rest(self, environ, memory, text, at, raw):
        """Read the variables from at on; raw is the piece that wasn't there ('': all were). Their number."""
        number, constants = self.skipped.get(raw, (self.plan[-1], ()))
        for name in constants:
            environ.pop(name, None)
            if name in self.base:                       # SCRIPT_NAME is always there
                environ[name] = self.base[name]
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
            what = {'\0': 'a variable without a name', '': 'the lengths in the block of variables do not add up'}
            raise BadRequest(what.get(raw, 'a name of more than 255 bytes'))
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
        if not SCHEME.isdisjoint(names[last + 1:]):     # the template couldn't have its value
            self.countdown = 0
            return
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
        start, end, started, later = None, 4, template, ()              # no text is equal to None
        if 'REQUEST_URI' in found:
            before = names[:names.index('REQUEST_URI')]
            begun = {name: text[slice(*found[name])] for name in before}
            if begun.get('REQUEST_METHOD') == 'GET' and begun.get('QUERY_STRING') == begun.get('CONTENT_LENGTH') == '':
                end = found['REQUEST_URI'][0] - 2
                start = text[4:end]
                started = {**template, **begun}
                later = ('', 0, 'REQUEST_URI'), *pieces[[name for _, _, name in pieces].index('REQUEST_URI') + 1:]
        self.plan = start, end, started.copy, later, template.copy, tuple(pieces), len(found)


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
        raise BadRequest(f'no name of a header: {name[:100]!r}')
    key = name.upper().replace('-', '_')
    if '_' in name or key == 'PROXY':
        key = ''                        # X_A would pass for X-A; HTTP_PROXY would steer the application's clients
    elif key not in ('CONTENT_TYPE', 'CONTENT_LENGTH'):
        key = 'HTTP_' + key
    if len(HEADER_KEYS) < 1000:         # clients can invent headers
        HEADER_KEYS[name] = sys.intern(key)
    return key


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


def unquote(path):
    from urllib.parse import unquote_to_bytes
    return unquote_to_bytes(path.encode('latin-1')).decode('latin-1')


def parse_first_line(line, environ):
    parts = line.split(' ')
    if len(parts) != 3 or not parts[0] or not TOKEN.issuperset(parts[0]):
        raise BadRequest('the first line is not METHOD TARGET HTTP/1.1')
    method, target, protocol = parts
    environ['REQUEST_METHOD'], environ['REQUEST_URI'] = method, target
    if protocol not in ('HTTP/1.1', 'HTTP/1.0'):
        other = len(protocol) == 8 and protocol[:5] == 'HTTP/' and protocol[6] == '.' and protocol[5::2].isdecimal()
        raise BadRequest(f'the protocol {protocol[:20]!r}',
                         '505 HTTP Version Not Supported' if other else '400 Bad Request')
    environ['SERVER_PROTOCOL'] = protocol
    if '#' in target or '\t' in target:
        raise BadRequest('a fragment or a tab in the target')
    path, _, query = target.partition('?')
    if path[:1] != '/':
        path = target_path(method, path, environ)
    environ['PATH_INFO'] = path if '%' not in path else unquote(path)
    environ['QUERY_STRING'] = query


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
            raise BadRequest(f'no header: {line[:100]!r}')
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


def words(value):
    """'a, B' -> ['a', 'b']: the value of a header that is a list."""
    return [word.strip(' \t') for word in value.lower().split(',')]


def keeps(environ):
    """May more requests follow on this connection?"""
    wish = environ.get('HTTP_CONNECTION', '').lower()
    wish = words(wish) if ',' in wish else (wish,)
    return 'close' not in wish and (environ['SERVER_PROTOCOL'] == 'HTTP/1.1' or 'keep-alive' in wish)


def content_length(value):
    if not (value.isascii() and value.isdecimal() and len(value) < 19):
        raise BadRequest(f'Content-Length {value[:30]!r}')
    return int(value)


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
# closes it: that is the worker, until Core.let_go() gives it to an Offloader, which calls done() once.

SMALL = 32768                           # so much always fits into an empty socket buffer: write() can't block
IOV_MAX = 1024
READ_MAX = 65536


def wait_for(fd, event, deadline):
    """Wait until a descriptor is ready; deadline in seconds of time.monotonic()."""
    if not ready_within(fd, event, max(0, deadline - time.monotonic())):
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


KEEP_UP = 0.01                          # seconds that a worker spends on a job once it had to wait


def send_chunks(fd, chunks, seconds):
    """A job that sends a list of bytes. `seconds`: until the socket must be writable again each time, which it is
    when a good part of its buffer is free."""
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
    """Take what the client still sends, for at most 64 MiB, a minute or 2 s of silence, so that it reads
    our answer: closing with unread bytes would reset the connection, and nginx then answers 502."""
    with socket.socket(fileno=os.dup(fd)) as connection:
        connection.shutdown(socket.SHUT_WR)
    left, until = 1 << 26, time.monotonic() + 60
    os.set_blocking(fd, False)
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
    """Run a job, from its first wait on for KEEP_UP. Returns None when it is done, else the job, begun,
    with what it waits for: (job, event, seconds)."""
    until = None
    for event, seconds in job:
        now = time.monotonic()
        until = until or now + KEEP_UP
        if now >= until or not ready_within(fd, event, until - now):
            return job, event, seconds
    return None


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


BODY_RATE = 500                         # bytes a second: who sends less can't hold a worker for long


class Body(io.RawIOBase):
    """A request body of known length: what came with the head, then what the connection brings.
    io.BufferedReader makes wsgi.input of it, and closes nothing."""

    def __init__(self, fd, begun, left, timeout):
        self.fd, self.begun, self.left, self.timeout = fd, begun, left, timeout
        self.patience = timeout         # how long we would wait: what comes slower than BODY_RATE uses it up
        self.waited = lambda seconds: None              # is told how long the client let us wait
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
        began = time.monotonic()
        got = read_some(self.fd, into, began + self.patience)
        waited = time.monotonic() - began
        self.patience = min(self.timeout, self.patience - waited + got / BODY_RATE)
        self.waited(waited)
        return got

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
            raise BadRequest(f'no size of a chunk: {size[:30]!r}')
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


def trimmed(chunks, size):
    """The first size bytes of a list of bytes."""
    kept = []
    for chunk in chunks:
        kept.append(chunk[:size])
        size -= len(kept[-1])
    return kept


class Response:
    """One response after the other. start_response() builds the head; write() and finish() send.

    length: promised by the application, None: unknown, -1: there is no body.  left: of it.  size: of the body, sent.
    end: of the head, what the server adds.  headers: their number.  http: '' or 'HTTP/1.1' or 'HTTP/1.0'.
    ending: how the connection ends: '' (as usual), 'cut', or 'drain' what the client sends."""

    __slots__ = ('fd', 'timeout', 'status', 'head', 'end', 'headers', 'length', 'left', 'size', 'sent', 'no_body',
                 'head_only', 'http', 'keep', 'chunked', 'blocking', 'job_timeout', 'ending', 'has_date', 'has_server',
                 'date', 'body', 'extra')

    def __init__(self, config):
        self.timeout, self.job_timeout = config.socket_timeout, config.http_timeout
        self.http = self.keep = self.chunked = self.sent = self.head_only = False
        self.extra = ''.join(f'{header.strip()}\r\n' for header in config.add_header)
        self.status, self.end, self.date, self.ending, self.size = None, self.extra + '\r\n', b'', '', 0
        self.head, self.headers, self.body = b'', 0, None

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
        self.headers = len(headers)
        self.no_body = no_body = no_body or self.head_only
        self.length = -1 if no_body else length
        self.left = 0 if no_body else length
        self.status = status
        return self.write

    def take_head(self):
        """The head as bytes, to be sent now with what comes first."""
        if self.status is None:
            raise AssertionError("the application didn't call start_response()")
        self.sent, self.size = True, 0
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
        return head + self.extra.encode('latin-1') + b'\r\n'

    def head_is_final(self):
        """Has take_head() nothing to add: no Date, Server, Connection or length, and no body to look at?"""
        return not self.http or (self.http == 'HTTP/1.1' or not self.keep) and not (
            self.has_date or self.has_server or self.body)

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
        return [*chunks] if head is None else [head, *chunks]           # never the application's own list

    def write(self, data):
        """PEP 3333's write(): send data (bytes) now."""
        if type(data) is not bytes:
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise TypeError(f'the body must be made of bytes, not of {type(data).__name__}')
            data = bytes(data)
        if data or not self.sent:
            self.send(self.frame([data]))

    def send(self, chunks):
        """Send a list of bytes, and wait here, since the application wants to go on: `timeout` seconds each time."""
        self.unblock()
        while chunks:
            try:
                write_some(self.fd, chunks)
            except BlockingIOError:
                wait_for(self.fd, select.POLLOUT, time.monotonic() + self.timeout)

    def send_small(self, body):
        """Send head and whole body (bytes) by one write(); the job that is left, or None."""
        data = self.head + body                         # a TypeError, if it isn't bytes, finds nothing sent
        self.sent, self.size, self.left = True, self.length, 0
        if len(data) > SMALL:                           # because of the head
            self.unblock()
        try:
            sent = os.write(self.fd, data)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            raise ClientGone(0, 'before the response') from None
        if sent == len(data):
            return None
        self.unblock()
        return run_a_while(self.fd, send_chunks(self.fd, [data[sent:]], self.job_timeout))

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
            return run_a_while(self.fd, job) if job else self.send_each(iter(result))
        finally:
            if hasattr(result, 'close'):
                self.close_result(result)

    def send_each(self, chunks):
        """Send each chunk as soon as it is there; the job that is left, or None."""
        job, first = None, next(chunks, None)
        if type(first) is bytes and self.length == len(first) < SMALL and not self.sent and self.head_is_final():
            job = self.send_small(first)
        elif first is not None:
            self.write(first)
        for chunk in chunks:
            self.write(chunk)
        return job if self.left == 0 and self.sent else run_a_while(self.fd, self.list_job([]))

    def close_result(self, result):
        try:
            result.close()
        except Exception:                               # the response was not harmed by it
            log_exception("close() of the application's result failed")

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
        return send_chunks(self.fd, chunks, self.job_timeout)

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
# If an option asks for static files, the application is wrapped in another, which answers GET and
# HEAD for regular files and leaves everything else to it. A path with .. in it is nobody's, and what
# a path names is followed through all links before it is compared with the directory that it must be
# in; so no spelling leads out. CGI scripts (part 8) are found in the same way.

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
        names = [below[:end] for end in range(len(below) + 1) if below[end:end + 1] in ('', '/')]
        if os.path.isdir(root + below):
            names = [f"{below.rstrip('/')}/{index}" for index in indexes]
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
        return re.compile(pattern).search, int(seconds)
    except (ValueError, re.error):
        raise AppError(f'static-expires = {value}: PATTERN SECONDS is expected, such as *.css 3600') from None


def is_fresh(environ, tag, modified):
    """Has the client got this version (RFC 9110, 13.2.2)? A date must be the one that we told, as for nginx."""
    known = environ.get('HTTP_IF_NONE_MATCH')
    if known is None:
        return environ.get('HTTP_IF_MODIFIED_SINCE') == modified
    return known.strip() == '*' or tag in [one.strip().replace('W/', '', 1) for one in known.split(',')]


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
        return FileWrapper(file)                        # to close it
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
    if not (config.check_static or config.static_map or config.static_map2):
        return application
    import mimetypes
    mimetypes.init()                                    # once, before the fork
    mounts = mount_points(f'={directory}' for directory in config.check_static) + mount_points(config.static_map)
    mounts += [(prefix, target + prefix) for prefix, target in mount_points(config.static_map2)]
    for _, target in mounts:
        if not os.path.exists(target):
            log(f'static files: there is no {target}')
    safe = [os.path.realpath(directory) for directory in config.static_safe]
    expires = [expiry(value) for value in config.static_expires]

    def static_or_application(environ, start_response):
        if environ['REQUEST_METHOD'] in ('GET', 'HEAD'):
            path = os.fsdecode(environ['PATH_INFO'].encode('latin-1'))
            for name, _, rest, _ in find_files(mounts, path, config.static_index, safe):
                seconds = next((seconds for matches, seconds in expires if matches(path)), None)
                with contextlib.suppress(OSError):      # it isn't ours to read
                    if not rest:
                        return send_static(environ, start_response, open(name, 'rb', buffering=0), seconds)
        return application(environ, start_response)
    return static_or_application


# ---------------------------------------------------------------------------------------------
# 8. Other languages
#
# Any program can be the worker of a master that owns the socket: with `worker-exec` each worker
# becomes a command that finds the listening socket at its descriptor 0. php-cgi speaks FastCGI there,
# a Go program what it likes. For Ruby and Perl the program stands here: the protocol of part 4 in two
# other languages. Both read a body whole, a large one into a file, before they call the application;
# so no byte is left unread that would reset the connection. The master stops them by SIGTERM, which
# they heed between two requests.

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
    return None


def become(command, sockets):
    """Execute a command in the place of this process. The sockets are its descriptors 3, 4 and so on, as
    sd_listen_fds(3) has it, and the first of them is 0 too. Comes back only if that fails."""
    import ctypes
    import fcntl
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG: when the master dies, however it dies
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:    # Python ignores some: it is inherited
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # comes from a terminal to the whole group: the master decides
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    free = [fcntl.fcntl(socket, fcntl.F_DUPFD_CLOEXEC, 3 + len(sockets)) for socket in sockets]
    for target, fd in enumerate(free, 3):
        os.set_blocking(fd, True)
        os.dup2(fd, target)
    os.dup2(free[0], 0)
    os.environ.update(LISTEN_FDS=str(len(free)), LISTEN_PID=str(os.getpid()))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        log(f"minuwsgi: can't execute {command[0]}: {error.strerror}")


# CGI (RFC 3875) is a WSGI application that runs a program for each request. Its input is a file with the
# whole body: nginx stops sending one when an answer begins, so a program that writes while it reads
# would wait for ever. Its output is streamed. The program leads a process group, which is killed when
# the client leaves or the program is silent for too long.

CGI_NAMES = ('HTTP', 'SERVER_', 'REMOTE_', 'REQUEST_', 'QUERY_', 'CONTENT_', 'DOCUMENT_', 'PATH_', 'SCRIPT_', 'AUTH_',
             'SSL_CLIENT_')             # how names begin that a request may set, as with Apache's suexec


def cgi_variables(environ, root, file, name, info):
    """The environment of a CGI program: the server's own and the request's, but for LD_PRELOAD and the like."""
    variables = {**os.environ, 'DOCUMENT_ROOT': root}
    variables.update((key, os.fsdecode(value.encode('latin-1'))) for key, value in environ.items()
                     if type(value) is str and key.startswith(CGI_NAMES))
    variables.update(GATEWAY_INTERFACE='CGI/1.1', SERVER_SOFTWARE=f'minuwsgi/{__version__}', REDIRECT_STATUS='200',
                     SCRIPT_NAME=name, SCRIPT_FILENAME=file, PATH_INFO=info,
                     PATH_TRANSLATED=info and variables['DOCUMENT_ROOT'] + info)
    for key in 'PATH_INFO', 'PATH_TRANSLATED', 'CONTENT_LENGTH', 'CONTENT_TYPE':
        if not variables.get(key):
            variables.pop(key, None)
    variables.pop('HTTP_PROXY', None)                   # a header must not steer the clients within the program
    return variables


def start_program(command, variables, body):
    import shutil
    import subprocess
    import tempfile
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(body, file)
        if file.tell():
            variables['CONTENT_LENGTH'] = str(file.tell())      # a chunked body has none
        file.seek(0)
        return subprocess.Popen(command, bufsize=0, stdin=file, stdout=subprocess.PIPE, env=variables,
                                cwd=os.path.dirname(command[-1]), start_new_session=True)


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
    import subprocess
    try:
        program = start_program(command, variables, body)
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
            variables = cgi_variables(environ, root, file, name, info)
            response = start_response.__self__
            return run_cgi([*helper, file], variables, environ['wsgi.input'], config.cgi_timeout, response)
        if fallback:
            return fallback(environ, start_response)
        return in_words(start_response, '404 Not Found', 'there is no such program')
    return application


# ---------------------------------------------------------------------------------------------
# 9. Jobs and offload threads
#
# A client that reads slowly must not hold a worker. What is left to send is a job: a generator that
# does what can be done at once and yields (event, seconds) when it has to wait. The worker runs it
# itself as long as the client keeps up, which is the cheapest way; then the job moves to a thread
# that waits for hundreds of descriptors at a time. sendfile(2) and writev(2) run without the GIL.

class Offloader:
    """A thread of a worker that runs jobs. It starts with the first job."""

    def __init__(self):
        self.inbox = collections.deque()                # (fd, (job, event, seconds), done)
        self.thread, self.poll = None, select.epoll()
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        self.poll.register(self.wake_read, select.EPOLLIN)
        self.jobs = {}                                  # fd -> [job, event, deadline, done]

    def take(self, fd, waiting, done):
        """Run a job that run_a_while() returned to its end; then done(fd, ok) owns the descriptor."""
        if self.thread is None:
            try:
                self.start()
            except RuntimeError as error:               # no memory for a thread
                log_now_and_then('offload', f'offload: {error}')
                return done(fd, False)
        self.inbox.append((fd, waiting, done))
        return os.write(self.wake_write, b'.')

    def start(self):
        import threading
        thread = threading.Thread(target=self.run, name='offload', daemon=True)
        thread.start()
        self.thread = thread

    def run(self):
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
                log_now_and_then('offload', f'offload: {error}')
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
        try:
            self.poll.unregister(fd)
            done(fd, ok)
        except OSError as error:                        # the application has closed it
            log(f'offload: {error.strerror}')

    def finish(self):
        """Wait until all jobs are done."""
        if self.thread is not None:
            os.write(self.wake_write, b'q')
            self.thread.join()


# ---------------------------------------------------------------------------------------------
# 10. Worker
#
# A worker is a process that serves. Core.serve() is the hot path; for a small request behind nginx
# it makes four system calls: accept4, preadv2, write, close. With one socket and one thread it waits
# in accept() itself; a select before it would be one more call, and would wake all workers for a
# connection that one gets. With several sockets, HTTP or threads, Core.wait() stands in for accept(): it watches
# listeners and kept HTTP connections at once, so that those that are silent or slow hold nobody.
#
# A stop must neither lose a connection nor wait for one. So the handler of the signal puts the end
# of a closed pipe in the place of the listening descriptor (dup2): the accept() that was
# interrupted is tried again by Python (PEP 475) and fails; a connection that came before is served.
# A signal between Python's check and the system call would go unnoticed until the next connection,
# which is why the master repeats it. (Its own death can be missed so: then one more request is served.)
# Core.wait() is woken by a pipe instead (stop_write), and look_at_time() ends it.

STOP_SIGNALS = signal.SIGTERM, signal.SIGHUP, signal.SIGIO      # for a worker
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGCHLD)

# A row of the scoreboard, one for each core, in shared memory: the last packet, then these numbers.
# READY: 1, or from when on it counts as ready. STARTED: when its request began, 0: idle. BUSY: seconds in all.
# LEAVING: 1 wants a successor, 2 has heard that it must stop.
PID, NUMBER, READY, STARTED, REQUESTS, ERRORS, BUSY, LEAVING = range(8)
NUMBERS = PACKET_MAX + 261              # for a bad packet Expected.rest() looks up to 258 bytes beyond its end
ROW_SIZE = NUMBERS + 8 * 8


def memory_of(pid='self'):
    """(address space, resident memory) of a process in bytes, see proc(5) on statm; zeros where it can't be read."""
    with contextlib.suppress(OSError), open(f'/proc/{pid}/statm') as file:
        return [int(pages) * mmap.PAGESIZE for pages in file.read().split()[:2]]
    return 0, 0


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
        if self.memory[0] > WSGI_STRIP:                 # the first line of a request over HTTP
            return ' '.join(self.memory[:512].split(b'\r\n')[0].decode('latin-1').split(' ')[:2])
        try:
            variables = dict(unpack_vars(self.memory[4:size]))
        except BadRequest:
            return '?'
        return f"{variables.get('REQUEST_METHOD', '?')} {variables.get('REQUEST_URI', '?')}"

    def clear(self):
        self.numbers[:] = memoryview(bytes(64)).cast('d')

    def as_worker(self):
        """For uwsgi.workers()."""
        requests, busy = int(self.numbers[REQUESTS]), int(self.numbers[BUSY] * 1e6)
        return {'id': int(self.numbers[NUMBER]), 'pid': int(self.numbers[PID]), 'requests': requests,
                'exceptions': int(self.numbers[ERRORS]), 'status': b'busy' if self.numbers[STARTED] else b'idle',
                'running_time': busy, 'avg_rt': busy // requests if requests else 0}


class Connection:
    """A client's connection over HTTP, between and during its requests."""

    __slots__ = ('fd', 'template', 'address', 'data', 'deadline', 'events', 'blocking', 'fields', 'again', 'keeps')

    def __init__(self, fd, template, address, deadline):
        self.fd, self.template, self.address, self.deadline = fd, template, address, deadline
        self.data = b''                                 # read, but not yet used
        self.blocking = True
        self.events = 0                                 # what the worker's epoll watches it for; 0: nothing
        self.fields = None                              # of the last GET, from HTTP/1.1 on: the bytes,
        self.again = self.keeps = None                  # what gives a new environ with them, may others follow

    def environ(self):
        """The environ before the head is read."""
        environ = self.template.copy()
        if type(self.address) is tuple:
            environ['REMOTE_ADDR'], environ['REMOTE_PORT'] = self.address[0], str(self.address[1])
        return environ


def hung_up(fd):
    """Has the client closed its connection? One that only ended its sending side hasn't: POLLHUP is for both."""
    return ready_within(fd, 0, 0)


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
    """Close a connection so that the client can't take the response for whole: over TCP by a reset. Over a unix
    socket only its Content-Length tells."""
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


class Harakiri(BaseException):
    """Breaks a request off that took longer than the option harakiri allows."""


class Core:
    """What serves one request at a time: a worker with one thread has one, others one for each thread."""

    def __init__(self, worker, number):
        self.worker, self.number, self.config = worker, number, worker.config
        self.row, self.application = worker.rows[number], worker.application
        self.response = Response(self.config)
        self.ready = []                                 # events that wait() has still to look at
        self.second, self.date, self.pid = 0, '', os.getpid()
        self.line_start, self.line_end = f'[pid: {self.pid}|app: 0|req: ', f'(1 switches on core {number})\n'
        self.write_log = worker.request_log.write
        self.total, self.log_format, self.picky = worker.total, self.config.log_format, self.config.disable_logging
        self.next_second, self.usual_end = 0.0, ''      # HTTP: when its headers change, what they are
        self.closing_end, self.known = '', {}           # known: header lines -> (environ of them, keep-alive)
        self.late = 0.0                                 # until then a client may have waited for too long
        self.template = {
            'REQUEST_METHOD': 'GET', 'SCRIPT_NAME': '', 'PATH_INFO': '', 'QUERY_STRING': '', 'SERVER_NAME': 'localhost',
            'SERVER_PORT': '80', 'SERVER_PROTOCOL': 'HTTP/1.1', 'wsgi.version': (1, 0), 'wsgi.url_scheme': 'http',
            'wsgi.input': EmptyInput(), 'wsgi.errors': sys.stderr, 'wsgi.multithread': self.config.threads > 1,
            'wsgi.multiprocess': self.config.processes > 1, 'wsgi.run_once': False, 'wsgi.file_wrapper': FileWrapper,
            'wsgi.input_terminated': True, 'uwsgi.version': __version__.encode(),
            'uwsgi.node': os.uname().nodename.encode()}
        self.expected = Expected(self.template)
        self.templates = {fd: dict(self.template, SERVER_NAME=listener.host, SERVER_PORT=listener.port, REMOTE_ADDR='',
                                   REMOTE_PORT='') for fd, listener in worker.listeners.items()}
        self.accepts = 0

    def serve(self, accept):
        """The hot path: connection after connection, until accept() fails because of a stop.

        What each request needs is a local variable; what is rare is in a method."""
        preadv, close, clock, nowait = os.preadv, os.close, time.monotonic, NOWAIT
        memory, packet, numbers = self.row.memory, [self.row.packet], self.row.numbers
        response, application, expected = self.response, self.application, self.expected
        start_response, logging = response.start_response, self.worker.logging
        start, start_end, started_environ, started_pieces, new_environ, all_pieces, planned = expected.plan
        nothing, limit = self.template, self.worker.limit
        while True:
            try:
                fd, _ = accept()
            except OSError as error:
                if self.worker.must_stop(error):
                    return
                continue
            numbers[STARTED] = began = clock()
            response.fd, response.status, response.length, response.blocking = fd, None, None, True
            response.head_only = False
            job = body = None
            environ, variables = nothing, 0
            try:
                if began < self.late and hung_up(fd):   # it waited behind a slow request, perhaps for too long
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
                simple = text[4:start_end] == start and not memory[0]       # a GET without a query, as expected
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
                if not simple:
                    response.head_only = environ['REQUEST_METHOD'] == 'HEAD'
                    if memory[0] == WSGI_STRIP:
                        strip_script_name(environ)
                    if environ.get('CONTENT_LENGTH'):
                        body = self.open_body(environ, fd, memory[end:got])

                result = application(environ, start_response)
                if type(result) is list and len(result) == 1 and response.length == len(result[0]) < SMALL \
                        and not response.sent:
                    job = response.send_small(result[0])
                else:
                    job = response.finish(result)
            except BaseException as error:
                self.failed(error)
            if job is None and not response.ending and (body is None or not body.left):
                close(fd)
            else:
                self.let_go(fd, job, body, close_after)
            ended = clock()
            took = ended - began
            if took > 0.1:
                self.late = ended + 10 * took           # those who wait now have their turn before that
            requests = numbers[REQUESTS] + 1
            numbers[REQUESTS] = requests
            numbers[BUSY] += took
            if logging:
                self.log_request(environ, variables, memory[1] + (memory[2] << 8), requests, began, ended)
            response.sent = False
            numbers[STARTED] = 0.0
            if requests >= limit:
                limit = self.worker.check_limits()

    # -- what is rare

    def receive(self, fd, got):
        """The head didn't come at once, or isn't for WSGI: read on. (bytes read, end of the packet)."""
        packet, deadline = self.row.packet, time.monotonic() + self.config.socket_timeout
        self.row.numbers[STARTED] = 0.0                 # socket-timeout holds for the head, and not harakiri
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
        end = 4 + packet[1] + (packet[2] << 8)
        while got < end:
            got += read_some(fd, packet[got:], deadline)
        self.row.numbers[STARTED] = time.monotonic()
        return got, end

    def open_body(self, environ, fd, begun):
        """Set wsgi.input; the Body, which knows what wasn't read, unless all of it is here."""
        length = body_length(environ) if self.response.http else content_length(environ['CONTENT_LENGTH'])
        limit = self.config.limit_post
        if limit and length > limit:
            raise BadRequest(f'the body has {length} bytes, limit-post allows {limit}', '413 Content Too Large')
        if 0 <= length <= len(begun):
            environ['wsgi.input'] = io.BytesIO(begun[:length])
            return None
        if length < 0:
            body = ChunkedBody(fd, begun, self.config.socket_timeout, limit or float('inf'))
        else:
            body = Body(fd, begun, length, self.config.socket_timeout)
        body.waited = self.not_its_time
        environ['wsgi.input'] = io.BufferedReader(body, READ_MAX)
        return body

    def not_its_time(self, seconds):
        """Time that the client took doesn't count for harakiri."""
        self.row.numbers[STARTED] += seconds

    def failed(self, error):
        """The one place where the exceptions of a request end."""
        self.worker.end_child(error)
        response, numbers = self.response, self.row.numbers
        if isinstance(error, ClientGone):
            response.status, response.size, response.keep = '499', response.size if response.sent else 0, False
            if error.errno:
                log_now_and_then(error.strerror, f'{self.row.request()}: {error.strerror}')
            if response.sent:
                response.ending = 'cut'
            return
        numbers[ERRORS] += 1
        if isinstance(error, BadRequest) and not response.sent:
            status, why, response.ending = error.status, str(error), 'drain'
            log_now_and_then(why[:12], f'bad request: {why}')          # a cause begins with its own words
        else:
            status, why = '500 Internal Server Error', ''
            log_exception(f'{self.row.request()}: the application failed')
        if isinstance(error, Harakiri):
            status = '504 Gateway Timeout'
        elif isinstance(error, (SystemExit, KeyboardInterrupt)):
            self.worker.leave('the application called sys.exit()')
        if response.sent:
            response.cut('the response was begun')
            return
        answer = plain_answer(status, why, response.date.decode() if response.http else '')
        response.status, response.sent, response.keep = status, True, False
        response.head, response.headers, response.size = answer[:answer.index(b'\r\n\r\n') + 4], 3, len(status) + 1
        try:
            os.write(response.fd, response.head if response.head_only else answer)
        except OSError:
            pass

    def let_go(self, fd, job, body, done):
        """Close a connection that needs more than close(): `done` follows when all is sent and read."""
        response = self.response
        ending, response.ending = response.ending, ''
        # What is unread is drained after the job; then the connection isn't kept, whatever `done` was.
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

    def log_request(self, environ, variables, size, requests, began, ended):
        """A line in uWSGI's format, byte for byte, or in that of log-format."""
        if ended >= self.next_second:
            self.tell_time()
        response, get, total = self.response, environ.get, self.total
        total[0] += 1
        took, status, head, headers = ended - began, (response.status or '500')[:3], response.head, response.headers
        if not response.sent:
            head, headers = b'', 0
        address = self.config.log_x_forwarded_for and get('HTTP_X_FORWARDED_FOR') or get('REMOTE_ADDR', '')
        if self.picky and not self.worth_a_line(status, took * 1000):
            return
        if self.log_format:
            line = self.formatted(environ, status, took, {
                'addr': address, 'headers': headers, 'hsize': len(head), 'size': len(head) + response.size,
                'vars': 2 * variables, 'pktsize': size})
        else:
            line = (f"{self.line_start}{int(requests)}/{total[0]}] {address} ({get('REMOTE_USER', '')}) "
                    f"{{{2 * variables} vars in {size} bytes}} [{self.date}] {get('REQUEST_METHOD', '')} "
                    f"{get('REQUEST_URI', '')} => generated {response.size} bytes in {int(took * 1000)} msecs "
                    f"({get('SERVER_PROTOCOL', '')} {status}) {headers} headers in {len(head)} bytes {self.line_end}")
        self.write_log(line.encode('latin-1', 'backslashreplace'))

    def worth_a_line(self, status, milliseconds):
        """With disable-logging, some requests are logged all the same."""
        config, size = self.config, self.response.size
        return (config.log_4xx and status[0] == '4' or config.log_5xx and status[0] == '5'
                or config.log_slow and milliseconds >= config.log_slow or config.log_zero and not size
                or config.log_big and size >= config.log_big)

    def formatted(self, environ, status, took, values):
        """The line of log-format: %(name) of uWSGI's names, %(var.NAME) of the environ; '-' for what isn't there."""
        now = time.time()
        local = time.strftime('%d/%b/%Y:%H:%M:%S %z', time.localtime(now))
        values.update({
            'uri': environ.get('REQUEST_URI'), 'method': environ.get('REQUEST_METHOD'),
            'user': environ.get('REMOTE_USER'), 'host': environ.get('HTTP_HOST'),
            'proto': environ.get('SERVER_PROTOCOL'),
            'uagent': environ.get('HTTP_USER_AGENT'), 'referer': environ.get('HTTP_REFERER'), 'status': status,
            'rsize': self.response.size, 'cl': environ.get('CONTENT_LENGTH') or 0, 'micros': int(took * 1e6),
            'msecs': int(took * 1e3), 'secs': f'{took:.6f}', 'tmsecs': int((now - took) * 1e3),
            'tmicros': int((now - took) * 1e6), 'time': int(now - took), 'epoch': int(now), 'ctime': self.date,
            'ltime': local, 'ftime': local, 'pid': self.pid,
            'wid': self.worker.number, 'req': self.total[0],
            'wreq': int(self.row.numbers[REQUESTS]), 'core': self.number, 'switches': 1, 'modifier1': 0,
            'modifier2': 0})

        def fill(name):
            value = environ.get(name[4:]) if name[:4] == 'var.' else values.get(name)
            return '-' if value in (None, '') else str(value).replace('\n', '\\n')
        return substitute('%(', self.log_format, fill) + '\n'

    def tell_time(self):
        """Bring the texts of the time up to date; strftime() would heed the locale."""
        now = time.time()
        self.next_second = time.monotonic() + 1 - now % 1
        if int(now) != self.second:
            self.second, self.date = int(now), time.ctime(now)
            reopen_log(self.config)                     # logrotate may have moved it
            utc = time.asctime(time.gmtime(now))
            day = utc[8:10].replace(' ', '0')
            date = f'Date: {utc[:3]}, {day} {utc[4:7]} {utc[20:]} {utc[11:19]} GMT\r\n'
            self.response.date, self.usual_end = date.encode(), f'{date}Server: minuwsgi\r\n{self.response.extra}\r\n'
            self.closing_end = f'Connection: close\r\n{self.usual_end}'

    # -- several listeners, HTTP, threads

    def wait(self):
        """Stands in for accept(): (descriptor, address) of the next connection that speaks uwsgi. HTTP is
        served meanwhile."""
        worker, connections, clock = self.worker, self.worker.connections, time.monotonic
        claim, poll = connections.pop, worker.poll.poll         # whoever has claimed a connection, alone uses it
        most = 1 if self.config.threads > 1 else 64     # threads must not hoard what others could do
        idle_timeout = self.config.http_timeout
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
                    worker.undrained.discard(fd)
                    continue
                self.accepts += 1
                if self.accepts % 16:                   # another one may wait: without epoll_wait(), -1 us
                    self.ready.insert(0, (fd, 0))
                if listener.protocol == 'uwsgi':
                    return new, address
                self.serve_http(Connection(new, self.templates[fd], address, clock() + idle_timeout))
            if worker.stopping or clock() >= worker.next_look:
                worker.look_at_time(busy)
            self.ready = [(fd, 0) for fd in list(worker.undrained)] or poll(1 if connections else None, most)

    def serve_http(self, connection):
        """Read what came, and answer each request whose head is whole."""
        data, memory, new = connection.data, self.row.memory, b''
        if not NOWAIT:
            self.worker.unblock(connection)
        try:
            new = memory[:os.preadv(connection.fd, [self.row.packet], -1, NOWAIT)]
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
            if data is not new:                         # else the row has it
                memory[:512] = data[:512].ljust(512)
            if not self.http_request(connection, data, end):
                return None
            data = connection.data
            self.worker.unblock(connection)             # from the second response on, write() might wait
        connection.data = data
        return self.worker.park(connection)

    def http_request(self, connection, data, end):
        """Answer one request; False when the connection isn't ours any more."""
        fd, response, numbers = connection.fd, self.response, self.row.numbers
        numbers[STARTED] = began = time.monotonic()
        if began >= self.next_second:
            self.tell_time()
        job = body = None
        response.fd, response.status, response.length = fd, None, None
        response.blocking, response.head_only = connection.blocking, False
        response.http, response.end, response.keep = 'HTTP/1.1', self.usual_end, not self.worker.stopping
        response.has_date = response.has_server = False
        try:
            if began < self.late and hung_up(fd):
                raise ClientGone(0, 'before its turn')
            # Clients mostly send the same header lines again: then only the target is read, -4 us of 17.
            line_end = data.find(b'\r\n') - 9           # where ' HTTP/1.1' begins
            fields = data[line_end:end]
            usual = end > 0 and data[:5] == b'GET /' and (
                fields == connection.fields or self.recall(connection, fields))
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
                if not (response.keep and connection.keeps):
                    response.keep, response.end = False, self.closing_end
            else:
                environ = connection.environ()
                body = self.open_request(connection, environ, data, end)
            result = self.application(environ, response.start_response)
            if type(result) is list and len(result) == 1 and response.length == len(result[0]) < SMALL \
                    and not response.sent and response.head_is_final():
                job = response.send_small(result[0])
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
        numbers[REQUESTS] += 1
        numbers[BUSY] += now - began
        if now - began > 0.1:
            self.late = now + 10 * (now - began)
        if self.worker.logging:
            variables = len(environ) - len(connection.template)
            self.log_request(environ, variables, max(end, 0) + 4, numbers[REQUESTS], began, now)
        response.sent, response.size, response.http, response.chunked = False, 0, False, False
        response.end = response.extra + '\r\n'
        response.body = None
        numbers[STARTED] = 0.0
        if numbers[REQUESTS] >= self.worker.limit:
            self.worker.check_limits()
        return clear and keep

    def remember(self, connection, fields, environ):
        """Keep what these bytes gave: all of it for the connection, for others only what the bytes say, never an
        address (nothing at all with trust-proxy). As copies, since applications change their environ."""
        connection.fields, connection.again, connection.keeps = fields, environ.copy().copy, self.response.keep
        if len(fields) < 4096 and not self.worker.trusted:
            if len(self.known) > 100:
                self.known.clear()
            self.known[fields] = {name: value for name, value in environ.items()
                                  if name[:5] == 'HTTP_' or name == 'CONTENT_TYPE'}, self.response.keep

    def recall(self, connection, fields):
        """Did another connection send the same header lines? Then this one is as if it had sent them before."""
        headers, connection.keeps = self.known.get(fields, (None, False))
        if headers is not None:
            connection.fields, connection.again = fields, {**connection.environ(), **headers}.copy
        return headers is not None

    def open_request(self, connection, environ, data, end):
        """Read a head into environ and prepare the response; the Body, unless all of it is here."""
        response = self.response
        response.head_only = data[:5] == b'HEAD '
        if not 0 <= end <= HEAD_MAX:
            raise BadRequest(*hopeless(data) or ('the head is too long', '431 Request Header Fields Too Large'))
        parse_head(data[:end], environ)
        response.http = environ['SERVER_PROTOCOL']
        if not (response.keep and keeps(environ)):
            response.keep, response.end = False, self.closing_end
        if self.worker.trusted and self.worker.trusts(environ['REMOTE_ADDR']):
            client_address(environ, self.worker.trusted)
        connection.data = data[end + 4:]
        if 'CONTENT_LENGTH' not in environ and 'HTTP_TRANSFER_ENCODING' not in environ:
            if response.http == 'HTTP/1.1' and environ['REQUEST_METHOD'] == 'GET' and environ['REQUEST_URI'][0] == '/':
                self.remember(connection, data[data.find(b'\r\n') - 9:end], environ)
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
        self.pid = os.getpid()
        self.listeners = {listener.socket.fileno(): listener for listener in listeners}
        self.connections = {}                           # HTTP: descriptor -> Connection that waits; who serves
                                                        # one has taken it out, so that nobody else closes it
        self.stopping = False
        self.closing_at = 0.0                           # when a stopping worker leaves its kept connections
        self.waiting = None                             # at a stop: the listener, for those who wait already
        self.offloaders, self.turn = [Offloader() for _ in range(max(1, config.offload_threads))], itertools.count()
        self.alarm_for = -1.0                           # when the request began that set_alarm() is for
        self.undrained = set()                          # at a stop, with epoll: listeners where somebody may wait yet
        self.poll = self.stop_read = None
        self.next_look = 0.0
        self.dead_end, other_end = os.pipe()            # what takes the place of a listener
        os.close(other_end)
        self.logging = not config.disable_logging or any((
            config.log_4xx, config.log_5xx, config.log_slow, config.log_zero, config.log_big))
        self.request_log = main_log
        for name in config.req_logger:
            self.request_log = Log(open_to_append(name))
        self.limit = self.most = math.inf               # requests until check_limits(), until we leave
        if config.max_requests:                         # not all workers at the same time
            delta = config.max_requests_delta * (number - 1) or config.max_requests * (os.getpid() % 11) // 100
            self.most = config.max_requests + delta
            self.limit = self.most if config.threads == 1 else 0        # with threads it takes a look each time
        if config.reload_on_rss or config.reload_on_as:
            self.limit = 0
        self.trusted = config.trust_proxy

    @property
    def offloader(self):
        """One after the other."""
        return self.offloaders[next(self.turn) % len(self.offloaders)]

    def run(self):
        """Serve until told to stop."""
        cores = [Core(self, i) for i in range(self.config.threads)]
        os.register_at_fork(before=lambda: self.before_fork(cores), after_in_child=self.in_forked_child,
                            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS))
        listener, *others = self.listeners.values()
        if others or len(cores) > 1 or listener.protocol != 'uwsgi':
            accept = cores[0].wait
            self.watch()
        else:
            accept = listener.socket._accept            # gives a bare descriptor: -1.4 us against accept()
        threads = []
        for offloader in self.offloaders if len(cores) > 1 else ():
            offloader.start()                           # not left to the first of several threads
        for core in cores[1:]:
            import threading
            threads.append(threading.Thread(target=core.serve, args=(core.wait,), daemon=True))
            threads[-1].start()
        if self.config.py_autoreload and self.number == 1 and self.master:
            self.watch_modules()
        self.tell_master(READY)
        cores[0].serve(accept)
        if self.waiting is not None:
            cores[0].serve(self.waiting._accept)
        for thread in threads:
            thread.join()
        for offloader in self.offloaders:
            offloader.finish()

    def handle_signals(self):
        """The handlers of a worker; once more after the application may have set its own. INT comes from a terminal
        to the whole group, and the master decides: nothing is done. QUIT kills."""
        import faulthandler
        for number in (*SIGNALS, signal.SIGALRM):
            faulthandler.unregister(number)             # when it is called again
            signal.signal(number, signal.SIG_DFL if number == signal.SIGQUIT else lambda *_: None)
        for number in STOP_SIGNALS:
            signal.signal(number, self.on_stop)
        signal.signal(signal.SIGUSR1, lambda *_: reopen_log(self.config))
        signal.signal(signal.SIGUSR2, self.tell_state)
        signal.signal(signal.SIGALRM, self.on_harakiri)
        for number in signal.SIGUSR2, signal.SIGALRM:   # the stacks come first, and even if Python hangs in C
            faulthandler.register(number, file=2, chain=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def watch_modules(self):
        """py-autoreload: a thread of the first worker that asks for a reload when a module's file changes."""
        def files():
            return {name: mtime(file) for name, module in list(sys.modules.items())
                    if (file := getattr(module, '__file__', None))}

        def watch(before):
            while True:
                time.sleep(self.config.py_autoreload)
                now = files()
                if any(before.get(name, changed) != changed for name, changed in now.items()):
                    os.kill(self.master, signal.SIGHUP)
                before = now
        import threading
        threading.Thread(target=watch, args=(files(),), name='py-autoreload', daemon=True).start()

    def tell_state(self, *_):
        log(f'worker {self.number} (pid {os.getpid()}): '
            + (', '.join(row.request() for row in self.rows if row.numbers[STARTED]) or 'idle'))

    def on_harakiri(self, *_):
        """The request takes too long. With one thread it is broken off, and the worker is replaced: after an exception
        at an arbitrary place its state can't be trusted. With several, none can be broken off: what doesn't end
        within harakiri-graceful-timeout is killed by the master, with all threads."""
        row, now = self.rows[0], time.monotonic()
        started, limit = row.numbers[STARTED], self.config.harakiri
        if len(self.rows) > 1:
            self.leave('harakiri, its stacks are above')
        elif started and (started == self.alarm_for or limit and now >= started + limit):   # else it came too late
            log(f'harakiri: worker {self.number} (pid {os.getpid()}) at {row.request()} for '
                f'{(now - started) * 1000:.0f} ms, its Python stack is above')
            self.leave('harakiri')
            raise Harakiri

    def set_alarm(self, seconds):
        """uwsgi.set_user_harakiri(): a limit for the request at hand, 0 takes it back."""
        self.alarm_for = self.rows[0].numbers[STARTED]
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def on_stop(self, number, _):
        """SIGTERM: everything ends, serve what waits. SIGHUP: others serve it. SIGIO: the master has died."""
        if self.stopping:                               # the master repeats it, to interrupt accept()
            return
        self.stopping, self.rows[0].numbers[LEAVING] = True, 2          # 2: the master sees that it was heard
        self.closing_at = time.monotonic() + 1
        if self.poll is not None:
            os.write(self.stop_write, b'.')
        for fd, listener in self.listeners.items():
            if self.poll is None:
                if number == signal.SIGTERM:
                    with contextlib.suppress(OSError):          # there may be no descriptor left for it
                        self.waiting = listener.socket.dup()
                        self.waiting.setblocking(False)         # for all that share it: they stop too
                os.dup2(self.dead_end, fd, inheritable=False)
            else:
                self.unwatch(fd)
        if self.poll is not None and number == signal.SIGTERM:
            self.undrained = set(self.listeners)        # wait() accepts from them until nobody waits any more

    def before_fork(self, cores):
        """The application forks: note what its child inherits. Signals wait: Python loses one that comes too early."""
        busy = [core.response for core in cores if core.row.numbers[STARTED]]
        self.inherited = [response.fd for response in busy if hasattr(response, 'fd')]
        self.inherited += [*self.listeners, *self.connections, *(fd for one in self.offloaders for fd in [*one.jobs])]
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def in_forked_child(self):
        """This is no worker. What was ours becomes a dead end: no client waits for this process, and it can answer
        none; and the signals that stop a process do so (multiprocessing's terminate())."""
        for fd in self.inherited:
            os.dup2(self.dead_end, fd, inheritable=False)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def end_child(self, error):
        """It came back to us, instead of ending itself."""
        if os.getpid() != self.pid:
            if not isinstance(error, SystemExit):
                log(f'a process that the application forked came back from its request, and is ended: {error!r}; it '
                    'should call os._exit(), or be made by subprocess')
            flush_streams()
            os._exit(1)

    def must_stop(self, error):
        """After a failed accept(): is it because of a stop? Otherwise wait until it may go better."""
        self.end_child(error)
        if self.stopping:
            return True
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            log_now_and_then('accept', f'worker {self.number}: accept: {error.strerror}')
            idle = sorted(connection.deadline for connection in list(self.connections.values()) if not connection.data)
            if idle:                                    # make room: a part of those that are silent the longest
                self.close_connections(lambda c: not c.data and c.deadline <= idle[len(idle) // 4])
            else:
                if error.errno == errno.EMFILE and not (self.connections or any(one.jobs for one in self.offloaders)):
                    self.leave('the application holds all descriptors')
                time.sleep(0.1)
        elif error.errno == errno.EAGAIN:               # workers with several sockets made it non-blocking
            select.select(list(self.listeners), [], [])
        elif error.errno != errno.ECONNABORTED:
            log(f'worker {self.number}: accept: {error.strerror}; did the application close the socket?')
            return True
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
                self.on_stop(signal.SIGTERM, None)

    def check_limits(self):
        """Between requests: is it time for a successor? From which number of requests on to look again."""
        config = self.config
        answered = sum(int(row.numbers[REQUESTS]) for row in self.rows)
        if answered >= self.most:
            self.leave(f'max-requests, it has answered {answered}')
        elif config.reload_on_rss or config.reload_on_as:
            size, rss = [size >> 20 for size in memory_of()]
            for name, most, is_now in ('rss', config.reload_on_rss, rss), ('as', config.reload_on_as, size):
                if most and is_now >= most:
                    self.leave(f'reload-on-{name} = {most}, it has {is_now} MB after {self.rows[0].request()}')
        if self.rows[0].numbers[LEAVING]:
            self.limit = math.inf
        return self.limit

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

    def park(self, connection, events=select.EPOLLIN):
        """Wait for more from the client without a thread that waits, until connection.deadline."""
        fd = connection.fd
        self.unblock(connection)
        self.connections[fd] = connection               # first: the event may come to another thread at once
        if connection.events != events:
            known, connection.events = connection.events, events
            (self.poll.modify if known else self.poll.register)(fd, events | self.one_shot)
        elif self.one_shot:
            self.poll.modify(fd, events | self.one_shot)

    def unblock(self, connection):
        if connection.blocking:
            os.set_blocking(connection.fd, False)
            connection.blocking = False

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
        if self.stopping and not busy:
            if now > self.closing_at:                   # who is in the middle of a head may end it
                self.close_connections(lambda connection: not connection.data)
            if not self.connections and not self.undrained:
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
# 11. Loading the application
#
# The application is loaded once, in the master before the fork: the workers share its memory, and a
# mistake in it shows before anybody is served. Whatever fails is said with where it was looked for.

EXIT_CONFIG = 1                         # a mistake in the configuration, an address that can't be bound
EXIT_NO_APP = 22                        # the application can't be loaded; uWSGI's number


def check_command(command, config):
    """Is the program there? For --check, and so before a reload: does it load its application?"""
    import shutil
    import subprocess
    if shutil.which(command[0]) is None:
        raise AppError(f'there is no program {command[0]}')
    if config.check and (config.rack or config.psgi):
        language, option, program, file = command
        if subprocess.call([language, option, ''.join(program.splitlines(True)[:3]), file]):    # up to its `app =`
            raise AppError(f'{file} failed to load')
    return command


def find_callable(module, attribute, spec):
    """The application in a module: name, a.b, or factory()."""
    found, name = module, attribute[:-2] if attribute.endswith('()') else attribute
    try:
        for part in name.split('.'):
            found = getattr(found, part)
    except AttributeError:
        there = [n for n in ('application', 'app', 'create_app') if hasattr(module, n)]
        hint = f'; it has {there[0]!r}: set callable = {there[0]}' if there else ''
        raise AppError(f'{spec.partition(":")[0]} has no {name!r}{hint}') from None
    found = found() if name != attribute else found
    if not callable(found):
        raise AppError(f'{spec.partition(":")[0]}: {name!r} is {found!r}, and no WSGI application')
    return found


def import_module(module):
    import importlib
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split('.')[0] == error.name.split('.')[0]:
            raise AppError(f'there is no module {error.name!r} in {sys.path[:3]} … (working directory '
                           f'{os.getcwd()}, Python {sys.executable}); see chdir, pythonpath, virtualenv') from None
        raise


def load_module(spec, name):
    module, _, attribute = spec.partition(':')
    if not module or '/' in module or module.endswith('.py'):
        raise AppError(f'{spec!r} is no module; for a file: wsgi-file = FILE')
    return find_callable(import_module(module), attribute or name, spec)


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


def load_spec(spec, config):
    return (load_file if spec.endswith(('.py', '.wsgi')) else load_module)(spec, config.callable)


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


def load_application(config):
    """The WSGI application that the options name, with its mounts; or the command that workers become."""
    command = worker_command(config)
    if command:
        return check_command(command, config)
    for name in getattr(config, 'import'):
        import_module(name)
    mounts = {}
    for mount in config.mount:
        prefix, _, spec = mount.partition('=')
        mounts[prefix.rstrip('/')] = load_spec(spec, config)
    default = None
    if config.module:
        default = load_module(config.module, config.callable)
    elif config.wsgi_file:
        default = load_file(config.wsgi_file, config.callable)
    if config.cgi:
        default = cgi_application(config, default)
    if default is None and not mounts:
        raise AppError('no application is named: set module = package.module:callable or wsgi-file = FILE')
    application = mounted(mounts, mounts.pop('', default), config.manage_script_name) if mounts else default
    if config.chdir2:
        try:
            os.chdir(config.chdir2)
        except OSError as error:
            raise AppError(f'chdir2 = {config.chdir2}: {error.strerror}') from None
    return with_static_files(config, application)


class Stopped(BaseException):
    """A signal that ends the server came while it was still starting."""


def load_or_log(config):
    """The application, or None after its traceback was logged."""
    try:
        return load_application(config)
    except AppError as error:
        log(f'minuwsgi: {config.where(config.module or config.wsgi_file)}{error}')
    except Stopped:
        raise
    except BaseException:
        log_exception('minuwsgi: the application failed to load')
    return None


def offer_uwsgi_module(config):
    """`import uwsgi` and `from uwsgidecorators import postfork`, for applications that have them in their
    code: the part of uWSGI's Python module that makes sense here. A list, for become_worker(), of the
    functions to call after the fork."""
    import types
    module, decorators, hooks = types.ModuleType('uwsgi'), types.ModuleType('uwsgidecorators'), []
    master = os.getpid()
    vars(module).update({
        'version': __version__.encode(), 'version_info': tuple(map(int, __version__.split('.'))), 'worker': None,
        'hostname': os.uname().nodename.encode(), 'numproc': config.processes, 'cores': config.threads,
        'has_threads': True, 'started_on': int(time.time()), 'applications': {},
        'opt': {setting.name: os.fsencode(setting.value) for setting in config.settings},
        'masterpid': lambda: master if config.master else 0,
        'worker_id': lambda: module.worker.number if module.worker else 0, 'mule_id': lambda: 0,
        'request_id': lambda: int(module.worker.rows[0].numbers[REQUESTS]) + 1,
        'total_requests': lambda: module.worker.total[0],
        'workers': lambda: tuple(row.as_worker() for row in module.worker.all_rows if row.numbers[PID]),
        'reload': lambda: os.kill(master, signal.SIGHUP) or True,
        'stop': lambda: os.kill(master, signal.SIGTERM) or True,
        'log': lambda message: log(message) or True, 'ready': lambda: True,
        'set_user_harakiri': lambda seconds: module.worker.set_alarm(seconds),
        'setprocname': lambda name: None, 'accepting': lambda: None})
    decorators.postfork = lambda function: hooks.append(function) or function
    sys.modules.update(uwsgi=module, uwsgidecorators=decorators)
    return hooks


def look_before_fork():
    """Warn of what an application did while it was loaded and that doesn't survive, or bear, a fork."""
    threading = sys.modules.get('threading')
    for thread in threading.enumerate() if threading else ():
        if thread is not threading.main_thread():
            log(f'warning: the application started the thread {thread.name!r} while it was loaded: workers do not have '
                'it. Start it in each worker (os.register_at_fork(after_in_child=...)), or set lazy-apps = true')
    for fd in range(3, 256):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as connection:
                peer = connection.getpeername()
        except OSError:                                 # there is no such descriptor, or it isn't connected
            continue
        log(f'warning: the application opened a connection to {peer} while it was loaded: all workers would share it. '
            'Close it in each worker (os.register_at_fork(after_in_child=...)), or set lazy-apps = true')


# ---------------------------------------------------------------------------------------------
# 12. Statistics
#
# The master answers, out of the scoreboard and the kernel's numbers, so that it does even when all
# workers are busy. uWSGI's tools read it, since it has uWSGI's names. No variables of requests are in it.

def queue(listener):
    """(connections that wait, how many may) of a listening socket: tcp(7) TCP_INFO, sock_diag(7)."""
    try:
        if listener.socket.family != socket.AF_UNIX:
            info = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
            return struct.unpack_from('=II', info, 24)          # tcpi_unacked, tcpi_sacked
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:       # NETLINK_SOCK_DIAG
            inode = os.fstat(listener.socket.fileno()).st_ino
            netlink.setblocking(False)
            netlink.send(struct.pack('=IHHIIBBHIIIII', 40, 20, 1, 0, 0, socket.AF_UNIX, 0, 0, 1 << 10, inode,
                                     0x10, 0xffffffff, 0xffffffff))                 # UDIAG_SHOW_RQLEN
            answer = netlink.recv(4096)
        size, kind = struct.unpack_from('=HH', answer, 32)      # behind nlmsghdr and unix_diag_msg
        return struct.unpack_from('=II', answer, 36) if kind == 4 else (0, 0)       # UNIX_DIAG_RQLEN
    except (OSError, AttributeError, struct.error):
        return 0, 0


class Stats:
    """The state of the server for uwsgitop and others: one JSON document for each connection, or with
    stats-http GET / (JSON), /metrics (Prometheus) and /health."""

    def __init__(self, master):
        self.master, self.asking = master, {}           # descriptor -> socket of a client that asks over HTTP
        self.listener = Listener(master.config.stats, 'stats', master.config)
        self.listener.socket.setblocking(False)

    def descriptors(self):
        return [self.listener.socket.fileno(), *self.asking]

    def vacuum(self):
        self.listener.vacuum()

    def close(self):
        self.listener.socket.close()

    def serve(self, fd):
        """Something can be read from one of our descriptors."""
        try:
            if fd == self.listener.socket.fileno():
                client, _ = self.listener.socket.accept()
                client.setblocking(False)
                if self.master.config.stats_http:
                    self.asking[client.fileno()] = client
                    if len(self.asking) > 64:           # silent ones make way
                        self.asking.pop(next(iter(self.asking))).close()
                    return
                answer = self.json()
            else:
                client = self.asking.pop(fd)
                path = client.recv(4096).split(b' ')[1:2]
                answer = self.over_http(path[0].decode('latin-1') if path else '')
            with client:
                client.settimeout(0.5)                  # a slow one must not hold the master
                client.sendall(answer)
        except OSError:
            time.sleep(0.01)                            # perhaps no descriptor is left, and it stays readable

    def over_http(self, path):
        status, kind, body = '200 OK', 'application/json', b''
        if path == '/health':
            status, kind, body = self.health()
        elif path == '/metrics':
            kind, body = 'text/plain; version=0.0.4', self.metrics()
        else:
            body = self.json()
        return (f'HTTP/1.0 {status}\r\nConnection: close\r\nAccess-Control-Allow-Origin: *\r\n'
                f'Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n').encode() + body

    def health(self):
        """Is there a worker that is idle, or got its request not long ago?"""
        now, limit = time.monotonic(), self.master.config.harakiri or 30
        workers = [child for child in self.master.children.values() if child.is_ready()]
        busy = [child for child in workers if len(child.busy()) == self.master.config.threads
                and all(now - row.numbers[STARTED] > limit for row in child.busy())]
        if len(busy) < len(workers):
            return '200 OK', 'text/plain', b'ok\n'
        text = f'all {len(workers)} workers are busy for more than {limit} s\n'
        return '503 Service Unavailable', 'text/plain', text.encode()

    def worker(self, child):
        numbers = [row.numbers for row in child.rows or ()]
        total = {name: sum(row[i] for row in numbers) for name, i in
                 (('requests', REQUESTS), ('errors', ERRORS), ('busy', BUSY))}
        vsz, rss = memory_of(child.pid)
        requests = int(total['requests'])
        status = 'busy' if child.busy() else 'idle'
        return {'id': child.number, 'pid': child.pid, 'accepting': int(child.is_ready() and not child.stop_with),
                'requests': requests, 'delta_requests': requests, 'exceptions': int(total['errors']),
                'harakiri_count': 0, 'signals': 0, 'signal_queue': 0, 'status': status, 'rss': rss, 'vsz': vsz,
                'running_time': int(total['busy'] * 1e6),
                'last_spawn': int(time.time() - time.monotonic() + child.born),
                'respawn_count': 1, 'tx': 0,
                'avg_rt': int(total['busy'] * 1e6 / requests) if requests else 0,
                'apps': [{'id': 0, 'modifier1': 0, 'mountpoint': '', 'startup_time': 0, 'requests': requests,
                          'exceptions': int(total['errors']), 'chdir': ''}],
                'cores': [{'id': i, 'requests': int(row[REQUESTS]), 'static_requests': 0, 'routed_requests': 0,
                           'offloaded_requests': 0, 'write_errors': 0, 'read_errors': 0,
                           'in_request': int(row[STARTED] > 0), 'vars': [], 'req_info': {}}
                          for i, row in enumerate(numbers)]}

    def json(self):
        import json
        queues = [queue(listener) for listener in self.master.listeners]
        return json.dumps({
            'version': __version__, 'listen_queue': sum(waiting for waiting, _ in queues), 'listen_queue_errors': 0,
            'signal_queue': 0, 'load': sum(waiting for waiting, _ in queues), 'pid': os.getpid(), 'uid': os.getuid(),
            'gid': os.getgid(), 'cwd': os.getcwd(), 'locks': [],
            'sockets': [{'name': listener.name, 'proto': listener.protocol, 'queue': waiting, 'max_queue': most,
                         'shared': 0, 'can_offload': 1}
                        for listener, (waiting, most) in zip(self.master.listeners, queues)],
            'workers': [self.worker(child) for child in sorted(self.master.children.values(), key=lambda c: c.number)],
        }, indent='\t').encode()

    def metrics(self):
        workers = [self.worker(child) for child in self.master.children.values()]
        lines = []
        for name, kind, values in (
                ('worker_requests_total', 'counter', [(w['id'], w['requests']) for w in workers]),
                ('worker_errors_total', 'counter', [(w['id'], w['exceptions']) for w in workers]),
                ('worker_rss_bytes', 'gauge', [(w['id'], w['rss']) for w in workers]),
                ('worker_busy', 'gauge', [(w['id'], int(w['status'] == 'busy')) for w in workers]),
                ('listen_queue', 'gauge', [(one.name, queue(one)[0]) for one in self.master.listeners]),
                ('worker_deaths_total', 'counter', [('all', self.master.deaths)])):
            lines.append(f'# TYPE minuwsgi_{name} {kind}')
            label = 'socket' if name == 'listen_queue' else 'worker'
            lines += [f'minuwsgi_{name}{{{label}="{which}"}} {value}' for which, value in values]
        return '\n'.join([*lines, '']).encode()


# ---------------------------------------------------------------------------------------------
# 13. Master
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
# It inherits the sockets and the old workers, which go on serving, and replaces them one by one. If
# only the new image fails to load (`stuck`), they go on too; none is replaced until a reload works.

class Signals:
    """The master's signals, as bytes in a pipe."""

    def __init__(self, reloaded):
        self.fd, self.write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self.write, False)
        if reloaded:                                    # there are workers to be stopped in order
            self.from_now_on()
        else:
            self.listen(self.while_starting)

    def listen(self, handler):
        signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # they are blocked over the exec of a reload

    def while_starting(self, number, _):
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            raise Stopped

    def from_now_on(self):
        """The application is loaded, and may have changed all this (asyncio does): nothing is interrupted any more."""
        self.listen(lambda *_: None)

    def read(self):
        return os.read(self.fd, 4096)

    def close(self):
        signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self.write)


class Notify:
    """Tells systemd how the server is, see sd_notify(3); only the master does."""

    def __init__(self):
        self.address = os.environ.get('NOTIFY_SOCKET', '')
        self.watchdog = self.address and int(os.environ.get('WATCHDOG_USEC', '0')) / 2e6
        self.last = 0.0

    def __call__(self, text):
        if self.address:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                    connection.sendto(text.encode(), self.address.replace('@', '\0', 1))
            except OSError as error:
                log(f'NOTIFY_SOCKET: {error.strerror}')

    def watch(self):
        if self.watchdog and time.monotonic() - self.last >= self.watchdog - 0.5:
            self.last = time.monotonic()
            self('WATCHDOG=1')


def oom_kills():
    """How many processes the kernel has killed for want of memory, see proc(5)."""
    try:
        with open('/proc/vmstat') as file:
            return next((int(line.split()[1]) for line in file if line.startswith('oom_kill ')), 0)
    except OSError:
        return 0


def name_process(config, role):
    """The name in ps and top (15 characters of it), see proc(5) on /proc/pid/comm."""
    if not (config.auto_procname or config.procname or config.procname_prefix or config.procname_prefix_spaced):
        return
    prefix = config.procname_prefix or config.procname_prefix_spaced and config.procname_prefix_spaced + ' '
    name = config.procname_master if role == 'master' and config.procname_master else config.procname
    try:
        with open('/proc/self/comm', 'w') as file:
            file.write((prefix or '') + (name or f'uWSGI {role}') + (config.procname_append or ''))
    except OSError:
        pass                                            # not Linux, or after setuid()


notify = Notify()
SETTLED = 1.0                           # seconds after which a program counts as ready


class Child:
    """A worker as the master sees it."""

    def __init__(self, pid, number, rows, hold, retire):
        self.pid, self.number, self.rows = pid, number, rows
        self.hold = hold                                # the end of its lifeline that is ours, see spawn()
        self.retire = retire                            # the signal that lets it finish while others go on
        self.born = time.monotonic()
        self.old = rows is None                         # from before the reload: to be replaced
        self.kill_at = self.stop_at = math.inf          # deadlines: SIGKILL; repeat the stop
        self.stop_with = None                           # the signal that told it to stop
        self.why_killed, self.overdue = '', None        # overdue: when the request began that harakiri is for

    def is_ready(self):
        return self.old or 0 < self.rows[0].numbers[READY] <= time.monotonic()

    def must_go(self):
        return self.old or bool(self.rows[0].numbers[LEAVING])

    def busy(self):
        """The rows of the cores that are serving."""
        return [row for row in self.rows or () if row.numbers[STARTED]]

    def since(self):
        """When the oldest of its requests began, inf without one. Each is read once: it may end meanwhile."""
        return min((began for row in self.rows or () if (began := row.numbers[STARTED])), default=math.inf)

    def is_deaf(self):
        """Idle, and yet it hasn't noticed that it was told to stop? One of another language can't say."""
        return self.retire == signal.SIGHUP and self.rows and self.rows[0].numbers[LEAVING] != 2 and not self.busy()

    def doing(self, now):
        """'GET /path for 41 ms', or '' when it is idle."""
        return ', '.join(f'{row.request()} for {(now - row.numbers[STARTED]) * 1000:.0f} ms' for row in self.busy())

    def answered(self):
        return sum(int(row.numbers[REQUESTS]) for row in self.rows or ())


def watch_the_end(threading, mercy, code):
    """In a thread: say which others keep a process from ending, and end it if they never do."""
    time.sleep(min(1, mercy / 2))
    names = [repr(one.name) for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    log(f'pid {os.getpid()} has {mercy} s to end, and waits for '
        + (f'the thread {", ".join(names)}; with daemon=True it would not' if names else 'a function of atexit'))
    time.sleep(mercy)
    os._exit(code)


def finish_process(mercy, code=0):
    """The end of a process: its threads and atexit functions, but not the interpreter's own
    dismantling, which would touch, and so copy, every page that is shared with the master."""
    import atexit
    threading = sys.modules.get('threading')
    if threading:
        with contextlib.suppress(RuntimeError):         # no memory for a thread: then nobody watches
            threading.Thread(target=watch_the_end, args=(threading, mercy, code), daemon=True).start()
        threading._shutdown()
    atexit._run_exitfuncs()
    flush_streams()
    return code


class Master:
    """The process that owns the sockets, and keeps the workers that there should be."""

    def __init__(self, config, listeners, application, pidfile, start, signals, hooks):
        self.config, self.listeners, self.application, self.hooks = config, listeners, application, hooks
        self.pidfile, self.start, self.signals = pidfile, start, signals
        self.children = {}                              # pid -> Child
        self.command = worker_command(config)
        self.all_rows = [[Row() for _ in range(config.threads)] for _ in range(2 * config.processes + 2)]
        self.free = list(self.all_rows)
        self.total = memoryview(mmap.mmap(-1, 4096)).cast('Q')
        self.wanted = config.processes                  # how many workers there should be now
        if 0 < config.cheaper < config.processes:
            self.wanted = min(max(config.cheaper, config.cheaper_initial), config.processes)
        self.calm, self.last_busy, self.last_answered = 0, time.monotonic(), 0
        self.turn = 0.0                                 # when converge() looked last
        self.stopping = 0                               # how often we were told to
        self.proof = None                               # the pid of the child that tries a reload
        self.reload_wanted = self.stuck = False         # stuck: after a reload that failed half-way
        self.ever_ready = self.announced = False
        self.failures, self.not_before = 0, 0.0         # deaths in a row, and the end of the back-off
        self.exit_code = 0
        self.deaths = 0
        self.oom_kills = oom_kills()
        self.touched = [*config.touch_reload, *config.touch_chain_reload]
        self.mtimes = list(map(mtime, self.touched))
        self.tick = math.inf                            # when look_round() is due
        if self.touched or config.log_maxsize or config.idle or notify.watchdog or \
                0 < config.cheaper < config.processes or self.command and config.reload_on_rss:
            self.tick = 0
        self.stats = None

    def run(self):
        """Converge, sleep, and again; the exit code."""
        while True:
            self.converge()
            if self.stopping and not self.children:
                break
            deadline = self.next_deadline()
            timeout = None if deadline == math.inf else max(0, deadline - time.monotonic())
            wait = [self.signals.fd, *(self.stats.descriptors() if self.stats else ())]
            for fd in select.select(wait, [], [], timeout)[0]:
                if fd != self.signals.fd:
                    self.stats.serve(fd)
                    continue
                for number in self.signals.read():
                    self.on_signal(number)
        vacuum(self.config, (*self.listeners, self.pidfile, self.stats))
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
        elif number in (signal.SIGUSR1, signal.SIGUSR2):
            if number == signal.SIGUSR1:
                reopen_log(self.config)
            if number == signal.SIGUSR1 or ready_within(2, select.POLLOUT, 0):      # a full log would hold the workers
                self.tell_all(number)

    def stop(self):
        self.stopping += 1
        now = time.monotonic()
        waited = [f'worker {c.number} busy with {c.doing(now)}' for c in self.children.values() if c.busy()]
        for child in self.children.values():
            if self.stopping > 1:
                child.kill_at = 0
            else:
                self.tell_to_stop(child, signal.SIGTERM)
        if self.proof is not None:
            os.kill(self.proof, signal.SIGKILL)
        log('stopping at once' if self.stopping > 1 else 'stopping' + ''.join(f'; {text}' for text in waited))
        notify('STOPPING=1')

    def tell_all(self, number):
        for pid, child in self.children.items():
            if child.retire == signal.SIGHUP:           # one of Python
                os.kill(pid, number)
            elif child.rows and number == signal.SIGUSR1:
                child.rows[0].numbers[LEAVING] = 1      # others keep the log that they began with: replace them

    def tell_to_stop(self, child, number):
        """Ask a worker to end; repeat it, since the first may come just before its accept()."""
        now = time.monotonic()
        if child.kill_at == math.inf:
            child.kill_at = now + self.config.worker_reload_mercy
            child.why_killed = f'it had {self.config.worker_reload_mercy} s to finish'
        child.stop_with, child.stop_at = number, now + 0.1
        try:
            os.kill(child.pid, number)
        except ProcessLookupError:
            pass

    # -- one turn of the loop

    def converge(self):
        self.reap()
        now = self.turn = time.monotonic()
        self.keep_deadlines(now)
        if now >= self.tick and not self.stopping:
            self.look_round(now)
        if self.stopping or self.stuck and not self.reload_wanted:
            return
        if not self.stuck:
            self.replace_workers(now)
        if self.reload_wanted and self.proof is None and (self.stuck or not any(
                child.old and not child.stop_with for child in self.children.values())):
            self.try_reload()
        serving = [child for child in self.children.values() if not child.stop_with]
        if not self.announced and serving and all(child.is_ready() and not child.old for child in serving):
            self.announced = True
            many = '1 worker' if len(serving) == 1 else f'{len(serving)} workers'
            log(f'ready: {many}' + (f' with {self.config.threads} threads each' if self.config.threads > 1 else ''))
            notify(f'READY=1\nSTATUS=ready, {many}')
            self.start.tell_parent()

    def keep_deadlines(self, now):
        """What is overdue: a worker that was told to stop, a request beyond harakiri."""
        for child in self.children.values():
            if now >= child.kill_at and child.overdue and child.overdue not in [
                    row.numbers[STARTED] for row in child.busy()]:
                child.kill_at, child.overdue = math.inf, None           # that request has ended after all
            elif now >= child.kill_at:
                doing = child.doing(now)
                log(f'worker {child.number} (pid {child.pid}) is killed: {child.why_killed or "stopping at once"}'
                    + (f', at {doing}' if doing else ''))
                child.kill_at = now + 1
                child.stop_with = child.stop_with or signal.SIGKILL
                os.kill(child.pid, signal.SIGKILL)
            elif now >= child.stop_at:
                self.tell_to_stop(child, child.stop_with)
                if now > child.kill_at - self.config.worker_reload_mercy + 2 and child.is_deaf():
                    child.kill_at, child.why_killed = now, 'it is idle, and heeds no signal: did the application ' \
                        'set a handler of its own?'
            elif self.config.harakiri and child.kill_at == math.inf:
                since = child.since()
                if now >= since + self.config.harakiri:         # it has a second to tell where it is
                    os.kill(child.pid, signal.SIGALRM)
                    child.kill_at = now + self.config.harakiri_graceful_timeout
                    child.why_killed, child.overdue = f'harakiri = {self.config.harakiri}', since
            lifetime = self.config.max_worker_lifetime
            if lifetime and child.rows and now >= self.end_of_life(child) and not child.must_go():
                log(f'worker {child.number} (pid {child.pid}) leaves: max-worker-lifetime')
                child.rows[0].numbers[LEAVING] = 1

    def end_of_life(self, child):
        config = self.config
        return child.born + config.max_worker_lifetime + (child.number - 1) * config.max_worker_lifetime_delta

    def next_deadline(self):
        now = time.monotonic()
        deadlines = [self.tick] if not self.stopping else []
        for child in self.children.values():
            deadlines += child.kill_at, child.stop_at
            if not child.old and child.rows[0].numbers[READY] > self.turn:      # even if it has come since then
                deadlines.append(child.rows[0].numbers[READY])
            if self.config.harakiri and child.kill_at == math.inf:      # no request can be overdue before that
                deadlines.append(min(child.since(), now) + self.config.harakiri)
            if self.config.max_worker_lifetime and child.rows and not child.must_go():
                deadlines.append(self.end_of_life(child))
        if now < self.not_before and not self.stopping:
            deadlines.append(self.not_before)
        return min(deadlines, default=math.inf)

    def look_round(self, now):
        """Every half second, if an option needs it: the load, touched files, the log's size."""
        self.tick = now + 0.5
        mtimes = list(map(mtime, self.touched))
        if mtimes != self.mtimes:
            self.mtimes, self.reload_wanted = mtimes, True
        if self.config.log_maxsize:
            rotate_log(self.config)
        notify.watch()
        serving = [child for child in self.children.values() if not child.stop_with and child.is_ready()]
        busy = sum(len(child.busy()) == self.config.threads for child in serving)
        answered = sum(child.answered() for child in serving)
        if answered != self.last_answered or any(child.busy() for child in serving):
            self.last_busy, self.last_answered = now, answered
        if 0 < self.config.cheaper < self.config.processes and len(serving) >= self.wanted:
            self.scale(busy, len(serving))
        if self.command and self.config.reload_on_rss:
            self.weigh_programs()
        limit = self.config.idle if self.config.die_on_idle and not self.command else 0
        if limit and now - self.last_busy > limit:
            log(f'idle for {self.config.idle} s')
            self.stop()

    def weigh_programs(self):
        """reload-on-rss for programs that don't know of it."""
        for child in self.children.values():
            rss = memory_of(child.pid)[1] >> 20
            if rss >= self.config.reload_on_rss and not child.must_go():
                log(f'worker {child.number} (pid {child.pid}) leaves: reload-on-rss, it has {rss} MB')
                child.rows[0].numbers[LEAVING] = 1

    def scale(self, busy, there):
        """cheaper: a step more when all workers are busy, or (backlog) too many connections wait; one less when two
        or more were idle at 2 * cheaper-overload looks since then."""
        waiting = sum(queue(listener)[0] for listener in self.listeners)
        backlog = self.command or self.config.cheaper_algo == 'backlog'         # whether a program is busy isn't known
        loaded = waiting > self.config.cheaper_overload if backlog else busy == there
        before = self.wanted
        if loaded or waiting and busy == there:
            self.calm, self.wanted = 0, min(self.config.processes, self.wanted + self.config.cheaper_step)
        elif busy + 1 < there:
            self.calm += 1
            if self.calm > 2 * self.config.cheaper_overload:
                self.calm, self.wanted = 0, max(self.config.cheaper, self.wanted - 1)
        if self.wanted != before:
            log(f'cheaper: {busy} of {there} workers are busy, {waiting} connections wait: {self.wanted} workers')

    def replace_workers(self, now):
        """Spawn what is missing, and one after the other a successor for each worker that must go."""
        starting = any(not child.is_ready() for child in self.children.values())
        for number in range(1, self.wanted + 1):
            mine = [child for child in self.children.values() if child.number == number and not child.stop_with]
            fresh = [child for child in mine if not child.must_go()]
            stale = [child for child in mine if child.must_go()]
            if not fresh and now >= self.not_before and self.free and not (stale and starting):
                self.spawn(number)
                starting = True
            successor = max((child.born for child in mine if child.is_ready() and not child.old), default=0.0)
            for child in stale:
                if child.born < successor:              # which may have to go itself by now
                    self.tell_to_stop(child, child.retire)
        for child in self.children.values():
            if child.number > self.wanted and not child.stop_with and not starting:
                self.tell_to_stop(child, child.retire)

    def spawn(self, number):
        """fork(), and all that belongs to it. The signals are blocked meanwhile: a signal to the young
        child would otherwise go into the pipe that it still shares with its parent."""
        rows = self.free.pop()
        for row in rows:
            row.clear()
        pipe, master = (), os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        flush_streams()
        try:
            pipe = lifeline, hold = os.pipe()
            pid = os.fork()
        except OSError as error:                        # too many processes or descriptors, no memory: later, perhaps
            for fd in pipe:
                os.close(fd)
            self.free.append(rows)
            self.not_before = time.monotonic() + 1
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            log(f'fork: {error.strerror}; the next try comes in 1 s')
            return
        if pid:
            os.close(lifeline)
            retire = signal.SIGTERM if self.command else signal.SIGHUP
            self.children[pid] = Child(pid, number, rows, hold, retire)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return
        status = 1
        try:
            os.close(hold)
            status = self.become_worker(number, rows, lifeline, master)
        except SystemExit as error:
            status = error.code if type(error.code) is int else 1
        except BaseException:
            log_exception(f'worker {number} failed')
        finally:
            os._exit(status)

    def become_worker(self, number, rows, lifeline, master):
        """In the child: let go of what is the master's, load the application if it wasn't, serve."""
        import fcntl
        self.signals.close()
        for fd in (child.hold for child in self.children.values()):
            os.close(fd)
        for owned in self.pidfile, self.stats:
            if owned is not None:
                owned.close()
        name_process(self.config, f'worker {number}')
        if self.command:                                # it can't say when it is ready: when it has lived for a while
            rows[0].numbers[READY] = time.monotonic() + SETTLED
            os.kill(master, signal.SIGCHLD)
            become(self.command, [listener.socket for listener in self.listeners])
            return EXIT_NO_APP
        worker = Worker(self.config, self.listeners, self.application, rows, self.total, number, master)
        worker.all_rows = [rows[0] for rows in self.all_rows]
        rows[0].numbers[PID], rows[0].numbers[NUMBER] = os.getpid(), number
        sys.modules['uwsgi'].worker = worker
        worker.handle_signals()
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        if os.getppid() != master:                      # it died before the lifeline was set
            return 1
        if worker.application is None:
            worker.application = load_or_log(self.config)
            if worker.application is None:
                return EXIT_NO_APP
        for hook in self.hooks:
            hook()
        worker.handle_signals()                         # the application may have set others meanwhile
        worker.run()
        return finish_process(self.config.worker_reload_mercy)

    def reap(self):
        """Take note of all children that ended; as pid 1 of a container there are strangers among them."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self.proof:
                self.after_proof(code)
            elif pid in self.children:
                self.bury(self.children.pop(pid), code, usage.ru_maxrss // 1024)

    def bury(self, child, code, rss):
        """A worker ended: say why if nobody asked it to, and slow down if that comes again and again."""
        now = time.monotonic()
        os.close(child.hold)
        ready, doing, answered = child.is_ready(), child.doing(now), child.answered()
        self.ever_ready = self.ever_ready or ready
        if self.command:
            answered = ready
        if child.rows is not None:
            child.rows[0].numbers[PID] = 0
            self.free.append(child.rows)
        if child.stop_with and (code in (0, -child.stop_with) or self.stopping or child.stop_with == signal.SIGKILL):
            return
        if not self.ever_ready and not any(other.old for other in self.children.values()) and code:
            if self.command:
                log(f'minuwsgi: {self.command[0]} ended before it was ready: {self.describe_exit(code)}')
            self.exit_code = EXIT_NO_APP if self.command or code < 0 else code
            self.stopping = 2                           # no use in trying again; a supervisor must see it
            for other in self.children.values():
                other.kill_at = 0
            return
        self.deaths += 1
        when = f'at {doing}' if doing else 'at what is unknown since the reload' if child.old else \
            'while idle' if ready else 'before it was ready'
        log(f'worker {child.number} (pid {child.pid}) died: {self.describe_exit(code)}, {when}, peak rss {rss} MB')
        self.failures = 0 if answered or doing else self.failures + 1
        if self.failures:
            delay = min(30, 0.5 * 2 ** min(self.failures - 1, 6))
            self.not_before = now + delay
            log(f'a new one comes in {delay:g} s')

    def describe_exit(self, code):
        if code >= 0:
            return f'exit status {code}'
        kills = oom_kills()
        memory = code == -signal.SIGKILL and kills > self.oom_kills
        self.oom_kills = kills
        name = signal.Signals(-code).name
        why = ', by the OOM killer of the kernel: memory is short' if memory else \
            ', not sent by us' if name == 'SIGKILL' else ''
        return f"{name}{why}"

    # -- reload

    def try_reload(self):
        """First the proof: a child does what --check does."""
        self.reload_wanted = False
        log('reload: trying the new configuration and application')
        notify(f'RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}\nSTATUS=reloading')
        with self.or_not_at_all(), self.start.as_then():
            self.proof = os.posix_spawn(sys.executable, [*self.start.command, '--check'], self.start.environment,
                                        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
                                        setsigmask=(), setsigdef=SIGNALS)

    def after_proof(self, code):
        self.proof = None
        if self.stopping:
            return
        if code:
            log('reload: failed, see above; the old code goes on serving')
            notify('READY=1\nSTATUS=the last reload failed, the old code is serving')
            return
        import json
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)       # until the new image has its handlers
        with contextlib.suppress(BlockingIOError):
            for number in self.signals.read():          # what came before that would be lost
                self.on_signal(number)
        if self.stopping:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return
        state = {'sockets': [(listener.address, listener.protocol, listener.socket.fileno(), listener.inode)
                             for listener in self.listeners],
                 'workers': [(child.pid, child.number, child.hold, child.retire)
                             for child in self.children.values()],
                 'pidfile': self.pidfile and (self.pidfile.path, self.pidfile.fd), 'again': self.reload_wanted}
        handed = [*(entry[2] for entry in state['sockets'] + state['workers']), *(state['pidfile'] or ())[1:]]
        for fd in handed:
            os.set_inheritable(fd, True)
        with self.or_not_at_all(), self.start.as_then():
            os.execve(sys.executable, self.start.command, {**self.start.environment, RELOADED: json.dumps(state)})
        for fd in handed:                               # we are still here
            os.set_inheritable(fd, False)

    @contextlib.contextmanager
    def or_not_at_all(self):
        """Python itself may be gone, or there may be no memory: that must not end a server that works."""
        try:
            yield
        except OSError as error:
            log(f'reload: failed, {sys.executable}: {error.strerror}; the old code goes on serving')
            notify('READY=1\nSTATUS=the last reload failed, the old code is serving')
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def adopt(self, workers):
        """After the exec: the workers of the old image are still our children."""
        for pid, number, hold, retire in workers:
            self.children[pid] = Child(pid, number, None, hold, retire)


# ---------------------------------------------------------------------------------------------
# 14. Command line
#
# main() reads the configuration; bind_load_and_run() does the rest, in this order: go where the log
# is, catch signals, take the sockets and the pidfile, give up root's rights, load the application,
# become the master (or, without one, the worker).

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
        before = [option for option in original[1:-len(sys.argv)] if option != '-m'] if original else []
        script, module = os.path.abspath(sys.argv[0]), sys.modules['__main__'].__spec__
        self.program = ['-m', module.name] if module else [script]
        self.command = [sys.executable, *before, *self.program, *arguments]
        if os.path.dirname(script) != os.getcwd():      # another Python may find no module of that name
            self.program = [script]
        self.directory = os.open('.', os.O_RDONLY)
        self.parent = None

    @contextlib.contextmanager
    def as_then(self):
        """In the directory where it was started."""
        here = os.open('.', os.O_RDONLY)
        os.fchdir(self.directory)
        try:
            yield
        finally:
            os.fchdir(here)
            os.close(here)

    def daemonize(self, name):
        """Go on in the background. The process in front waits until the workers are ready; if they never
        are, it shows the log and ends with the server's exit code."""
        wait, self.parent = os.pipe()
        at = os.path.getsize(name) if os.path.exists(name) else 0
        pid = os.fork()
        if not pid:
            os.close(wait)
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            open_log(name)
            return
        os.close(self.parent)
        if os.read(wait, 1):
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError), open(name, 'rb') as file:
            file.seek(at)
            os.write(2, file.read())
        os._exit(code if code > 0 else 1)

    def tell_parent(self):
        if self.parent is not None:
            os.write(self.parent, b'.')
            os.close(self.parent)
            self.parent = None


def curl(address, path='/'):
    """Ask a uwsgi server for a path, and print what it answers."""
    name, _, query = path.partition('?')
    variables = {'REQUEST_METHOD': 'GET', 'REQUEST_URI': path, 'PATH_INFO': unquote(name), 'QUERY_STRING': query,
                 'SERVER_PROTOCOL': 'HTTP/1.1', 'SERVER_NAME': 'localhost', 'SERVER_PORT': '80',
                 'HTTP_HOST': 'localhost'}
    tcp, size = ':' in address and '/' not in address, 0
    try:
        host, _, port = address.rpartition(':')
        with socket.socket(socket.AF_UNIX) if not tcp else socket.create_connection(
                (host.strip('[]') or '127.0.0.1', int(port))) as connection:
            connection.settimeout(60)
            if not tcp:
                connection.connect('\0' + address[1:] if address[:1] == '@' else address)
            connection.sendall(pack_request(variables))
            while data := connection.recv(READ_MAX):
                size += sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--curl {address}: {getattr(error, 'strerror', None) or error}") from None
    if not size:
        raise ConfigError(f'--curl {address}: the connection was closed without an answer')


def set_limits(config):
    if config.max_fd or config.limit_as:
        import resource
        for name, kind, limit in (('max-fd', resource.RLIMIT_NOFILE, config.max_fd),
                                  ('limit-as', resource.RLIMIT_AS, config.limit_as << 20)):
            hard = resource.getrlimit(kind)[1]
            try:
                if limit:
                    resource.setrlimit(kind, (limit, hard if hard < 0 else max(limit, hard)))
            except (OSError, ValueError) as error:
                log(f'{name}: {error}')


def prepare(config):
    """Make the process what the options ask for; what the application sees is in place then."""
    if config.umask is not None:
        os.umask(config.umask)
    for item in config.env:
        name, _, value = item.partition('=')
        os.environ[name.strip()] = value.strip()
    set_limits(config)
    if config.chdir:
        try:
            os.chdir(config.chdir)
        except OSError as error:
            raise ConfigError(f'{config.where(config.chdir)}chdir = {config.chdir}: {error.strerror}') from None
    sys.path.insert(0, os.getcwd())
    for directory in reversed(config.pythonpath):
        sys.path[:0] = [os.path.abspath(found) for found in glob_sorted(directory) or [directory]]
    sys.argv[1:] = config.pyargv.split() if config.pyargv else []
    sys.modules.setdefault('minuwsgi', sys.modules[__name__])       # `module = minuwsgi:demo` is this file


def enter_python(config, start):
    """Go on as the Python of `virtualenv`, unless this is it."""
    directory = os.path.abspath(config.virtualenv or sys.prefix)
    tried = os.environ.pop('MINUWSGI_VIRTUALENV', None) == directory
    if os.path.realpath(sys.prefix) == os.path.realpath(directory):
        return
    python = os.path.join(directory, 'bin', 'python')
    why = 'its Python is not that of a virtual environment' if tried else None
    if not os.access(python, os.X_OK):
        why = 'it has no bin/python' if os.path.isdir(directory) else 'there is no such directory'
    if why is None:
        try:
            os.execve(python, [python, *start.program, *sys.argv[1:]], {**os.environ, 'MINUWSGI_VIRTUALENV': directory})
        except OSError as error:
            why = f"can't run its bin/python, {error.strerror}"
    raise ConfigError(f'{config.where(config.virtualenv)}virtualenv = {directory}: {why}; make one with: '
                      f'python3 -m venv {directory}')


NO_SOCKET = 'no socket is named: set socket = PATH or http-socket = :8000'


def check(config):
    """Print each line of the configuration, then all that would stop a start. The exit code."""
    offer_uwsgi_module(config)
    show_config(config)
    errors = list(config.errors)
    trials = [(prepare, config), (owner, f'{config.uid or ""}:{config.gid or ""}'), (owner, config.chown_socket or '')]
    trials += [(parse_address, address) for address in config.socket + config.uwsgi_socket + config.http_socket]
    for trial, what in trials:
        try:
            trial(what)
        except ConfigError as error:
            errors.append(config.where(what) + str(error))
    for path in config.pidfile, config.logto:
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            errors.append(f'{config.where(path)}{path}: there is no such directory')
    if not config.socket + config.uwsgi_socket + config.http_socket and 'LISTEN_FDS' not in os.environ:
        errors.append(NO_SOCKET)
    for error in errors:
        log(f'minuwsgi: {error}')
    loaded = load_or_log(config) is not None
    return EXIT_CONFIG if errors else 0 if loaded else EXIT_NO_APP


def activated():
    """{address: descriptor} of the sockets that systemd has bound for us, see sd_listen_fds(3)."""
    found = {}
    if os.environ.get('LISTEN_PID') == str(os.getpid()):
        for fd in range(3, 3 + int(os.environ.get('LISTEN_FDS', '0'))):
            try:
                with socket.socket(fileno=os.dup(fd)) as listener:
                    name = listener.getsockname()
            except OSError as error:
                raise ConfigError(f'LISTEN_FDS: descriptor {fd}: {error.strerror}') from None
            found[name if type(name) is str else '%s:%d' % name[:2]] = fd
    return found


def bind(config, inherited, listeners):
    """Fill the list of listeners; inherited: [(address, protocol, descriptor, inode)] from before a reload."""
    kept = {(address, protocol): Listener(address, protocol, config, fd, inode)
            for address, protocol, fd, inode in inherited}
    listeners += kept.values()                          # all of them, so that none is lost if something fails
    given = activated()
    wanted = [(address, config.protocol) for address in config.socket]
    wanted += [(address, 'uwsgi') for address in config.uwsgi_socket]
    wanted += [(address, 'http') for address in config.http_socket]
    for address, protocol in dict.fromkeys(wanted):
        fd = given.pop('0.0.0.0' + address if address[:1] == ':' else address, None)
        if (address, protocol) not in kept:
            try:
                listeners.append(Listener(address, protocol, config, fd))
            except ConfigError as error:
                raise ConfigError(f'{config.where(address)}{error}') from None
    for fd in given.values():                           # named by systemd alone
        wanted.append((f'fd://{fd}', config.protocol))
        if wanted[-1] not in kept:
            listeners.append(Listener(f'fd://{fd}', config.protocol, config, fd))
    for key in kept.keys() - set(wanted):               # the new configuration has it no more
        kept[key].vacuum()
        kept[key].socket.close()
        listeners.remove(kept[key])
    if config.listen > LISTEN_MAX:
        log(f'listen = {config.listen}: the kernel allows {LISTEN_MAX}; '
            f'for more: sysctl net.core.somaxconn={config.listen}')
    if not listeners:
        raise ConfigError(NO_SOCKET)
    for name in 'LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES':       # used, and not for what the application starts
        os.environ.pop(name, None)


class Pidfile:
    """The file with the master's pid, locked while the master lives: a stale one is no obstacle."""

    def __init__(self, path, fd=None):
        import fcntl
        self.path = os.path.abspath(path)
        try:
            self.fd = fd if fd is not None else open_safely(self.path, os.O_RDWR, 0o644)
            os.set_inheritable(self.fd, False)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fd is None:
                os.ftruncate(self.fd, 0)
                os.pwrite(self.fd, b'%d\n' % os.getpid(), 0)
        except BlockingIOError:
            pid = os.pread(self.fd, 20, 0).decode().strip()
            raise ConfigError(f'pidfile = {path}: a server with the pid {pid} holds it; stop it first') from None
        except OSError as error:
            raise ConfigError(f"pidfile = {path}: can't write it: {error.strerror}") from None

    def close(self):
        os.close(self.fd)

    def vacuum(self):
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self.fd)):
                os.unlink(self.path)
        except OSError:
            pass


def drop_privileges(config):
    """Become uid and gid, for good, see credentials(7)."""
    if not (config.uid or config.gid):
        return
    import pwd
    __import__('traceback')                             # for log_exception(): later it may not be ours to read
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
    except KeyError:
        raise ConfigError(f'uid = {config.uid}: nothing is known of this user, so set gid too') from None
    except OSError as error:
        raise ConfigError(f'uid, gid: {error.strerror}: only root can become another user') from None
    except OverflowError:
        raise ConfigError(f'uid = {config.uid}, gid = {config.gid}: there is no such user or group') from None
    if uid > 0 and 0 in os.getresuid():
        raise ConfigError('uid: the privileges of root could not be dropped')


def serve_alone(config, listeners, application, pidfile, start):
    """Without a master: this process is the worker."""
    rows = [Row() for _ in range(config.threads)]
    if type(application) is list:
        become(application, [listener.socket for listener in listeners])
        return EXIT_NO_APP
    worker = Worker(config, listeners, application, rows, memoryview(bytearray(8)).cast('Q'), 1, None)
    worker.handle_signals()
    signal.signal(signal.SIGINT, worker.on_stop)
    for name in 'harakiri', 'stats', 'touch_reload', 'max_worker_lifetime':
        if getattr(config, name):
            log(f"{name.replace('_', '-')} needs a master: it does nothing with master = false")
    log('ready: this process serves, without a master')
    start.tell_parent()
    worker.run()
    vacuum(config, (*listeners, pidfile))
    return finish_process(config.worker_reload_mercy)


def inherited_state():
    """What the image before a reload hands over, see Master.after_proof()."""
    text = os.environ.pop(RELOADED, None)
    if text is None:
        return {'reloaded': False, 'sockets': [], 'workers': [], 'pidfile': None, 'again': False}
    import json
    state = json.loads(text)
    for _, _, hold, _ in state['workers']:              # at once, before the application can start anything
        os.set_inheritable(hold, False)
    return {'reloaded': True, **state}


def go_where_the_log_is(config, start, reloaded):
    """Go to the background, open the logs, say who we are."""
    if config.log_date is not None:
        log_date[:] = [config.log_date if '%' in config.log_date else '%a %b %d %H:%M:%S %Y']
    for name in 'NOTIFY_SOCKET', 'WATCHDOG_USEC':       # not for the application, and what it starts
        os.environ.pop(name, None)
    if config.daemonize and not reloaded:
        start.daemonize(config.logto)
    elif reloaded:                                      # by now it may not be ours to open
        reopen_log(config)
    elif config.logto:
        open_log(config.logto)
    sys.stdout = io.TextIOWrapper(Log(1), 'utf-8', 'backslashreplace', line_buffering=True)
    sys.stderr = io.TextIOWrapper(main_log, 'utf-8', 'backslashreplace', line_buffering=True)
    for name in config.req_logger if not reloaded else ():
        fresh, fd = not os.path.lexists(name), open_to_append(name)
        if fresh and not os.getuid():
            os.fchown(fd, *owner(f'{config.uid or ""}:{config.gid or ""}'))         # who opens it in the workers
        os.close(fd)
    log(f"minuwsgi {__version__}, Python {sys.version.split()[0]}, pid {os.getpid()}{', reloaded' * reloaded}")
    for text in config.print:
        log(text)


def take_place(config, state, owned, pidfile):
    """Be where the options say, with sockets and pidfile; the Pidfile or None."""
    path = config.pidfile and os.path.abspath(config.pidfile)               # before chdir, as in uWSGI
    prepare(config)
    bind(config, state['sockets'], owned)
    if pidfile and pidfile.path != path:
        pidfile.vacuum()
        pidfile = None
    if path and not pidfile:
        pidfile = Pidfile(path)
    log('listening on ' + ', '.join(f'{listener.name} ({listener.protocol})' for listener in owned))
    drop_privileges(config)
    if not os.getuid() and not config.uid:
        log('warning: the application runs as root, and so does whoever finds a hole in it: set uid and gid')
    return pidfile


def bind_load_and_run(config, start, owned):
    """The steps of a start in their order; `owned` gathers the listeners, for who has to clean up."""
    state = inherited_state()
    reloaded = state['reloaded']
    go_where_the_log_is(config, start, reloaded)
    signals = Signals(reloaded)
    application, stuck, hooks = None, False, offer_uwsgi_module(config)
    pidfile = Pidfile(*state['pidfile']) if state['pidfile'] else None
    try:
        pidfile = take_place(config, state, owned, pidfile)
        if not config.lazy_apps or not config.master:
            application = load_or_log(config)
            stuck = application is None
    except ConfigError as error:
        if not reloaded:
            vacuum(config, owned)
            raise
        log(f'minuwsgi: {error}')
        stuck = True
    if stuck and not reloaded:
        vacuum(config, owned)
        return EXIT_NO_APP
    if stuck:
        log('reload: failed, see above; the old workers go on serving, none can be replaced until the next reload')
    if not config.master:
        return serve_alone(config, owned, application, pidfile, start)
    look_before_fork()
    gc.collect()
    gc.freeze()                                         # the workers' collections leave the shared pages alone
    name_process(config, 'master')
    signals.from_now_on()
    master = Master(config, owned, application, pidfile, start, signals, hooks)
    master.stuck, master.reload_wanted = stuck, state['again']
    master.adopt(state['workers'])
    if config.stats:
        try:
            master.stats = Stats(master)
        except ConfigError as error:
            log(f'minuwsgi: stats: {error}')            # no reason not to serve
    return finish_process(config.worker_reload_mercy, master.run())


def serve(config, start):
    """The server, until it is told to stop. Its exit code."""
    owned = []
    try:
        return bind_load_and_run(config, start, owned)
    except Stopped:
        log('stopped while starting')
        vacuum(config, owned)
        return 0


def send_signal(what, name=''):
    """--stop, --reload PIDFILE."""
    import fcntl
    if not name:
        raise ConfigError(f'{what} PIDFILE: which pidfile?')
    try:
        with open(name) as file:
            pid = int(file.read())
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                os.kill(pid, signal.SIGTERM if what == '--stop' else signal.SIGHUP)
                return 0
    except (OSError, ValueError) as error:
        raise ConfigError(f'{what} {name}: {getattr(error, "strerror", None) or "there is no pid in it"}') from None
    raise ConfigError(f'{what} {name}: the server with the pid {pid} does not run any more')


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
            if len(arguments) < 2:
                raise ConfigError('--curl SOCKET [PATH]: which socket?')
            curl(*arguments[1:3])
            return 0
        if arguments[0] in ('--stop', '--reload'):
            return send_signal(*arguments[:2])
        start = Start(arguments)
        config = Config(arguments)
        if config.show_config:
            show_config(config)
            return 0
        try:
            enter_python(config, start)
        except ConfigError as error:
            config.errors.append(str(error))
        if config.check:
            return check(config)
        for warning in config.warnings:
            log(warning)
        if config.errors:
            raise ConfigError('\n'.join(config.errors))
        return serve(config, start)
    except ConfigError as error:
        log(f'minuwsgi: {error}')
        return EXIT_CONFIG


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))


