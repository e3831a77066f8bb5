//! Programs that do not make it easy.

use super::*;
use crate::server::has_ended;

#[test]
fn a_socket_that_was_copied_before_it_was_bound_is_replaced_everywhere() {
    let address = own_address();
    let server = exec_at(address, &[]);
    server.upgrade(&["--env", "PLAIN=copy", "--wait", "drained"]).exits_with(0);
    assert_eq!(get(address, "/env/HANDOVER_GENERATION"), "2");
}

/// The others go on, and what is in `/proc` under the process's own number is empty from then on (pthread_exit(3)).
pub(super) const MAIN_THREAD_ENDS: &str = r#"
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
before, after = socket.create_server(address()), None

def main_thread_has_ended():
    with open("/proc/self/stat") as stat:
        return stat.read().rpartition(") ")[2][0] == "Z"

def serve(listener):
    while True:
        answer(listener)

def serve_by_epoll(listener):
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    while poll.poll():
        answer(listener)

def go_on():
    while not main_thread_has_ended():
        time.sleep(0.001)
    threading.Thread(target=serve, args=[before]).start()
    threading.Thread(target=serve_by_epoll, args=[socket.create_server(address(1))]).start()
    signal.sigwait([signal.SIGTERM])
    os._exit(0)

threading.Thread(target=go_on).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
"#;

#[test]
fn a_program_that_ends_its_main_thread_is_seen_to_serve() {
    let address = own_address();
    let server = python(MAIN_THREAD_ENDS, &[&address.to_string()]);
    assert!(!has_ended(server.worker_pids()[0]), "its other threads live");
    let sockets = server.sockets();
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(server.sockets(), sockets);
    assert_eq!(sockets.len(), 2);
    for address in [address, next_to(address)] {
        assert_eq!(ask(address, "/").answerer().generation, 2);
    }
}

/// As `address(1)` of a script.
pub(super) fn next_to(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port() + 1)
}

const PREFORKED: &str = r#"
listener = socket.create_server(address())
for number in range(3):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        while True:
            answer(listener)
while True:
    time.sleep(1)
"#;

#[test]
fn children_that_accept_for_their_parent_are_seen_to_wait() {
    let address = own_address();
    let server = python(PREFORKED, &[&address.to_string()]);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    assert_eq!(ask(address, "/").answerer().generation, 2);
}

/// One that leaves its parent behind is nobody's worker: what it binds is its own affair.
const LEAVES: &str = r#"
listener = socket.create_server(address())
if os.environ["HANDOVER_GENERATION"] == "2":
    if os.fork() == 0:
        parent = os.getpid()
        if os.fork() != 0:
            os._exit(0)
        while os.getppid() == parent:
            time.sleep(0.01)
        try:
            socket.create_server(address())
            said = "was given it"
        except OSError as error:
            said = error.strerror
        with open(sys.argv[2] + ".new", "w") as file:
            file.write(said)
        os.rename(sys.argv[2] + ".new", sys.argv[2])
        os._exit(0)
    os.wait()
while True:
    listener.accept()
"#;

#[test]
fn a_process_outside_the_tree_of_the_program_is_given_nothing() {
    let home = Home::new();
    let said = home.path("said");
    let address = own_address().to_string();
    let server = python(LEAVES, &[&address, said.to_str().unwrap()]);
    server.upgrade(&["--wait", "drained"]).exits_with(0);
    let text = eventually("what it has said", || fs::read_to_string(&said).ok());
    assert!(text.starts_with("Address already in use"), "{text}");
}

/// Of two workers the first binds before it connects, to an address that the second one binds meanwhile.
const BINDS_AS_CLIENT: &str = r#"
def at(name):
    return f"{sys.argv[2]}/{name}"

def tell(name, text):
    with open(at(name) + ".new", "w") as file:
        file.write(text)
    os.rename(at(name) + ".new", at(name))

def wait_for(name):
    while not os.path.exists(at(name)):
        time.sleep(0.001)
    with open(at(name)) as file:
        return file.read()

def sleeps(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(") ")[2][0] == "S"

listener, client = socket.create_server(address()), socket.socket()
try:
    os.close(os.open(at("first"), os.O_CREAT | os.O_EXCL))
    client.bind(address(1))
    tell("bound", "")
    other = wait_for("binds")
    while not os.path.exists(at("said")) and not sleeps(other):
        time.sleep(0.001)
    client.connect((address()[0], int(sys.argv[3])))
except FileExistsError:
    wait_for("bound")
    tell("binds", str(os.getpid()))
    try:
        client.bind(address(1))
        tell("said", "was given it")
    except OSError as error:
        tell("said", error.strerror)
while True:
    answer(listener)
"#;

#[test]
fn a_socket_of_a_client_is_given_to_nobody() {
    let home = Home::new();
    let (address, directory) = (own_address(), home.path("").display().to_string());
    let peer = std::net::TcpListener::bind((address.ip(), 0)).unwrap();
    let port = peer.local_addr().unwrap().port().to_string();
    let text = script(BINDS_AS_CLIENT);
    let said = home.path("said");
    let program = ["python3", "-c", &text, &address.to_string(), &directory, &port];
    let server = exec_in(home, &["--workers", "2"], &program);
    let text = eventually("what it has said", || fs::read_to_string(&said).ok());
    assert!(text.starts_with("Address already in use"), "{text}");
    assert_eq!(server.sockets().len(), 1);
}

#[track_caller]
fn keeps_its_listeners(script: &str, count: usize) {
    let server = python(script, &[&own_address().to_string()]);
    let sockets = server.sockets();
    assert_eq!(sockets.len(), count);
    for _ in 0..2 {
        server.upgrade(&["--trial", "0s", "--wait", "drained"]).exits_with(0);
        assert_eq!(server.sockets(), sockets);
    }
}

/// Signals come all the time, as in a Go program: their handlers have SA_RESTART.
const INTERRUPTED: &str = r#"
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
listeners = [socket.create_server(address(number)) for number in range(200)]
signal.setitimer(signal.ITIMER_REAL, 0)
wait_on(listeners)
"#;

#[test]
fn calls_that_signals_interrupt_come_to_the_same() {
    keeps_its_listeners(INTERRUPTED, 200);
}

/// A child of a shell, with a filter of its own, that binds a privileged port in a thread and then gives its rights up.
const GUARDED: &str = r#"
PTRACE = 117 if os.uname().machine == "aarch64" else 101
refuse(PTRACE)
listeners = []
thread = threading.Thread(target=lambda: listeners.append(socket.create_server(address())))
thread.start()
thread.join()
os.setgid(65534)
os.setuid(65534)
while True:
    answer(listeners[0])
"#;

#[test]
fn a_program_that_guards_itself_is_given_its_socket_too() {
    if !is_root_or_skip("a privileged port") {
        return;
    }
    let ip = own_address().ip();
    let shell = "trap 'kill $!; wait $!; exit 0' TERM; python3 -c \"$0\" \"$1\" & wait $!";
    let script = script(GUARDED);
    let server = exec_in(Home::new(), &[], &["sh", "-c", shell, &script, &format!("{ip}:80")]);
    let sockets = server.sockets();
    for generation in 2..=3 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        assert_eq!(ask(SocketAddr::new(ip, 80), "/").answerer().generation, generation);
    }
    assert_eq!(server.sockets(), sockets);
}

/// Threads that start programs (by `vfork`, as Python does) while others bind.
const STARTS_PROGRAMS: &str = r#"
is_over = threading.Event()
def start():
    while not is_over.is_set():
        subprocess.run(["true"])
threads = [threading.Thread(target=start) for _ in range(2)]
for thread in threads:
    thread.start()
listeners = [socket.create_server(address(number)) for number in range(50)]
is_over.set()
for thread in threads:
    thread.join()
wait_on(listeners)
"#;

#[test]
fn a_program_that_starts_others_while_it_binds() {
    keeps_its_listeners(STARTS_PROGRAMS, 50);
}

/// Binds by the 32-bit interface of the kernel, `int 0x80`.
#[cfg(target_arch = "x86_64")]
const OF_32_BITS: &str = r#"
import mmap
MAP_32BIT = 0x40
memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_32BIT, prot=7)
host, port = address()
name = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(host) + bytes(8)
# push rbx; mov eax, edi; mov ebx, esi; xchg ecx, edx; int 0x80; pop rbx; ret
code = bytes.fromhex("5389f889f387d1cd805bc3")
memory[:len(code)] = code
memory[1024:1024 + len(name)] = name
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_int)(base)
listener = socket.socket()
BIND = 361
result = call(BIND, listener.fileno(), base + 1024, len(name))
if result != 0:
    sys.exit(f"bind: {result}")
listener.listen()
while True:
    listener.accept()
"#;

#[cfg(target_arch = "x86_64")]
#[test]
fn a_32_bit_call_is_passed_by_with_a_warning() {
    let address = own_address().to_string();
    let server = python(OF_32_BITS, &[&address]);
    assert!(server.home.log().contains("runs a 32-bit program: what it listens on is not kept for its next build"));
    // EADDRINUSE: nothing was put in the place of its socket.
    server.upgrade(&[]).exits_with(1).complains("bind: -98");
    assert_eq!(server.serving().generation, 1);
}

const IN_CHROOT: &str = r#"
os.chroot(sys.argv[1])
os.chdir("/run")
if os.path.exists("app.sock"):
    os.unlink("app.sock")
listener = socket.socket(socket.AF_UNIX)
listener.bind("app.sock")
listener.listen()
while True:
    listener.accept()
"#;

#[test]
fn a_path_below_another_root() {
    if !is_root_or_skip("chroot") {
        return;
    }
    let home = Home::new();
    fs::create_dir_all(home.path("jail/run")).unwrap();
    let (root, path) = (home.path("jail"), home.path("jail/run/app.sock"));
    let server = python(IN_CHROOT, &[root.to_str().unwrap()]);
    let sockets = server.sockets();
    for _ in 0..2 {
        server.upgrade(&["--wait", "drained"]).exits_with(0);
        UnixStream::connect(&path).unwrap();
    }
    assert_eq!(server.sockets(), sockets);
    assert!(sockets.first().unwrap().0.ends_with("/jail/run/app.sock"));
}

/// Accepts one after the other. A later build has sockets that do not block, and fails.
const BLOCKS: &str = r#"
if os.environ["HANDOVER_GENERATION"] == "1":
    listener = socket.create_server(address())
    while True:
        answer(listener)
listener = socket.socket()
listener.setblocking(False)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(address())
sys.exit(3)
"#;

/// The same, with a socket that it is given.
const BLOCKS_ON_NAMED: &str = r#"
listener = socket.socket(fileno=3)
if os.environ["HANDOVER_GENERATION"] != "1":
    listener.setblocking(False)
    sys.exit(3)
while True:
    answer(listener)
"#;

/// The mode is that of the socket, which both builds have.
#[test]
fn a_build_that_fails_leaves_the_mode_of_the_sockets_as_it_was() {
    blocks_on(own_address(), &[], BLOCKS);
    let address = own_address();
    blocks_on(address, &["--listen", &address.to_string()], BLOCKS_ON_NAMED);
}

#[track_caller]
fn blocks_on(address: SocketAddr, options: &[&str], text: &str) {
    let server = exec_in(Home::new(), options, &["python3", "-c", &script(text), &address.to_string()]);
    let worker = server.worker_pids();
    server.upgrade(&[]).exits_with(1).complains("exited with status 3");
    for _ in 0..3 {
        assert_eq!(ask(address, "/").answerer().generation, 1);
    }
    assert_eq!(server.worker_pids(), worker);
    // The one that is started again has it so as well.
    server.restart(&[]).exits_with(1);
    server.wait_for_workers(1);
    for _ in 0..3 {
        assert_eq!(ask(address, "/").answerer().generation, 1);
    }
    assert_eq!(server.workers()[0].crashes, 0);
}
