use super::*;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("handover-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn tcp<'a>(name: &'a str, address: &str) -> Wanted<'a> {
    let options = WantedOptions::Tcp(TcpOptions::default());
    Wanted { name, kind: Kind::Tcp, address: Address::Ip(address.parse().unwrap()), options }
}

fn unix<'a>(name: &'a str, path: &Path, options: UnixOptions) -> Wanted<'a> {
    Wanted { name, kind: Kind::Unix, address: Address::unix(path), options: WantedOptions::Unix(options) }
}

fn gate() -> Gate {
    Gate::new(|| {}).unwrap()
}

/// What a process that has claimed `wanted` would hand over.
fn handed_over(wanted: &[Wanted<'_>]) -> Vec<Inherited> {
    let (mut old, gate) = (Listeners::new(vec![], true), gate());
    for one in wanted {
        old.claim(one, &gate).unwrap();
    }
    let inherit = |entry: &Entry| Inherited {
        name: entry.name.clone(),
        kind: entry.kind,
        address: entry.address.clone(),
        cookie: entry.cookie,
        path: entry.path,
        backlog: entry.backlog,
        source: Source::HandedOver,
        activated: false,
        fd: entry.socket.fd().unwrap().try_clone().unwrap(),
    };
    old.entries().map(inherit).collect()
}

#[test]
fn the_same_name_and_address_keep_the_socket_and_port_0_means_any() {
    let inherited = handed_over(&[tcp("http", "127.0.0.1:0")]);
    let (cookie, address) = (inherited[0].cookie, inherited[0].address.clone());
    let mut new = Listeners::new(inherited, false);
    let gate = gate();
    let entry = new.claim(&tcp("http", "127.0.0.1:0"), &gate).unwrap();
    assert_eq!((entry.cookie, &entry.address), (cookie, &address));
    assert_eq!(new.claims().kept, ["http"]);
}

#[test]
fn two_names_on_one_address_stay_apart() {
    let inherited = handed_over(&[tcp("a", "127.0.0.1:0"), tcp("b", "127.0.0.1:0")]);
    let cookies: Vec<u64> = inherited.iter().map(|inherited| inherited.cookie).collect();
    let (mut new, gate) = (Listeners::new(inherited, false), gate());
    assert_eq!(new.claim(&tcp("b", "127.0.0.1:0"), &gate).unwrap().cookie, cookies[1]);
    assert_eq!(new.claim(&tcp("a", "127.0.0.1:0"), &gate).unwrap().cookie, cookies[0]);
}

#[test]
fn another_address_is_bound_afresh_and_the_old_one_is_unclaimed() {
    let (mut new, gate) = (Listeners::new(handed_over(&[tcp("http", "127.0.0.1:0")]), false), gate());
    assert_eq!(new.claim(&tcp("http", "127.0.0.2:0"), &gate).unwrap().source, Source::Bound);
    let claims = new.claims();
    assert_eq!(
        (claims.kept.len(), claims.added, claims.unclaimed),
        (0, vec!["http".to_owned()], vec!["http".to_owned()])
    );
}

#[test]
fn an_overlapping_address_names_the_one_that_is_in_its_way() {
    let inherited = handed_over(&[tcp("http", "127.0.0.1:0")]);
    let Address::Ip(address) = inherited[0].address else { panic!() };
    let (mut new, gate) = (Listeners::new(inherited, false), gate());
    let Err(error) = new.claim(&tcp("http", &format!("0.0.0.0:{}", address.port())), &gate) else { panic!() };
    assert!(error.to_string().contains(&format!("handed over with the address {address}")), "{error}");
}

#[test]
fn what_an_earlier_run_has_left_is_not_in_the_way() {
    let inherited = handed_over(&[tcp("http", "127.0.0.1:0"), tcp("other", "127.0.0.1:0")]);
    let ports = inherited.iter().map(|one| if let Address::Ip(address) = one.address { address.port() } else { 0 });
    let (ports, gate) = (ports.collect::<Vec<_>>(), gate());
    let mut new = Listeners::new(inherited, true);
    assert_eq!(new.claim(&tcp("http", &format!("0.0.0.0:{}", ports[0])), &gate).unwrap().source, Source::Bound);
    assert_eq!(new.claims().unclaimed, ["other"]);
    // Nothing but the listener's own old socket is closed for it.
    assert!(new.claim(&tcp("third", &format!("0.0.0.0:{}", ports[1])), &gate).is_err());
}

#[test]
fn a_name_is_used_once_and_must_be_valid() {
    let (mut listeners, gate) = (Listeners::new(vec![], true), gate());
    listeners.claim(&tcp("http", "127.0.0.1:0"), &gate).unwrap();
    for bad in ["http", "", "a:b"] {
        let Err(error) = listeners.claim(&tcp(bad, "127.0.0.1:0"), &gate) else { panic!() };
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}

#[test]
fn what_a_service_manager_passes_is_found_by_name_or_by_address() {
    let named = handed_over(&[tcp("http", "127.0.0.1:0"), tcp("unknown", "127.0.0.1:0")]);
    let cookies: Vec<u64> = named.iter().map(|inherited| inherited.cookie).collect();
    let second = named[1].address.to_string();
    let activated =
        named.into_iter().map(|inherited| Inherited::activated(inherited.name, inherited.fd).unwrap().unwrap());
    let (mut new, gate) = (Listeners::new(activated.collect(), true), gate());
    // By name, whatever address the program has in mind; without its name, by address.
    assert_eq!(new.claim(&tcp("http", "127.0.0.9:1"), &gate).unwrap().cookie, cookies[0]);
    assert_eq!(new.claim(&tcp("admin", &second), &gate).unwrap().cookie, cookies[1]);
}

/// Nothing else can be bound there, and the service manager holds it under its old name.
#[test]
fn what_was_stored_under_another_name_is_found_by_its_address_alone() {
    let named = handed_over(&[tcp("http", "127.0.0.1:0"), tcp("admin", "127.0.0.1:0")]);
    let (address, cookie) = (named[0].address.to_string(), named[0].cookie);
    let stored = named.into_iter().map(|inherited| Inherited::stored(inherited.name, inherited.fd).unwrap().unwrap());
    let (mut new, gate) = (Listeners::new(stored.collect(), true), gate());
    assert_ne!(new.claim(&tcp("any", "127.0.0.1:0"), &gate).unwrap().cookie, cookie);
    assert_eq!(new.claim(&tcp("web", &address), &gate).unwrap().cookie, cookie);
    assert_eq!(new.closed_names(), ["http"]);
}

#[test]
fn the_policy_decides_about_what_is_unclaimed() {
    let mut closing = Listeners::new(handed_over(&[tcp("a", "127.0.0.1:0")]), false);
    closing.settle_unclaimed(Unclaimed::Close, &gate());
    assert!(closing.entries().len() == 0);
    let mut keeping = Listeners::new(handed_over(&[tcp("a", "127.0.0.1:0")]), false);
    keeping.settle_unclaimed(Unclaimed::Keep, &gate());
    assert_eq!(keeping.entries().next().unwrap().name, "a");
}

#[test]
fn a_unix_path_has_the_mode_before_it_listens_and_is_unlinked_only_if_ours() {
    let directory = Directory::new("unix-mode");
    let path = directory.0.join("s.sock");
    let (mut listeners, gate) = (Listeners::new(vec![], true), gate());
    listeners.claim(&unix("s", &path, UnixOptions::default().mode(0o600)), &gate).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::remove_file(&path).unwrap();
    let _foreign = UnixListener::bind(&path).unwrap();
    listeners.unlink_paths(true);
    assert!(path.exists());
    let ours = directory.0.join("ours.sock");
    listeners.claim(&unix("ours", &ours, UnixOptions::default()), &gate).unwrap();
    listeners.unlink_paths(true);
    assert!(!ours.exists());
}

/// Its directory may be somebody else's too, and a link leads anywhere.
#[test]
fn the_mode_of_what_took_the_place_of_a_unix_path_is_left_alone() {
    let directory = Directory::new("unix-replaced");
    let (path, precious) = (directory.0.join("s.sock"), directory.0.join("precious"));
    let inherited = handed_over(&[unix("s", &path, UnixOptions::default())]);
    std::fs::write(&precious, "").unwrap();
    std::fs::set_permissions(&precious, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&precious, &path).unwrap();
    let (mut new, gate) = (Listeners::new(inherited, false), gate());
    new.claim(&unix("s", &path, UnixOptions::default().mode(0o666)), &gate).unwrap();
    new.apply_pending();
    assert_eq!(std::fs::metadata(&precious).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn of_several_addresses_the_one_that_is_handed_over_is_kept() {
    let inherited = handed_over(&[tcp("http", "127.0.0.2:0"), tcp("admin", "127.0.0.3:0")]);
    let (cookie, Address::Ip(address)) = (inherited[0].cookie, inherited[0].address.clone()) else { panic!() };
    let listeners = Listeners::new(inherited, false);
    for port in [0, address.port()] {
        let text = |ip: u8| format!("127.0.0.{ip}:{port}");
        let mut wanted = [tcp("http", &text(1)), tcp("http", &text(2)), tcp("http", &text(3))];
        listeners.put_inherited_first(&mut wanted);
        let order = wanted.map(|one| one.address.to_string());
        assert_eq!(order, [text(2), text(1), text(3)]);
    }
    let mut wanted = [tcp("http", "127.0.0.1:0"), tcp("http", "127.0.0.2:0")];
    let (mut listeners, gate) = (listeners, gate());
    listeners.put_inherited_first(&mut wanted);
    assert_eq!(listeners.claim(&wanted[0], &gate).unwrap().cookie, cookie);
}

#[test]
fn a_stale_unix_path_is_replaced_one_that_answers_or_is_no_socket_is_not() {
    let directory = Directory::new("unix-stale");
    let (mut listeners, gate) = (Listeners::new(vec![], true), gate());
    let stale = directory.0.join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    listeners.claim(&unix("stale", &stale, UnixOptions::default()), &gate).unwrap();
    UnixStream::connect(&stale).unwrap();

    let alive = directory.0.join("alive.sock");
    let _other = UnixListener::bind(&alive).unwrap();
    let Err(error) = listeners.claim(&unix("alive", &alive, UnixOptions::default()), &gate) else { panic!() };
    assert!(error.to_string().contains("another process listens there"), "{error}");

    let file = directory.0.join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(listeners.claim(&unix("file", &file, UnixOptions::default()), &gate).is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

/// Somebody who may bind, and not give the socket away. This thread alone is anybody else.
#[test]
fn a_path_is_not_left_behind_where_its_owner_cannot_be_set() {
    let directory = Directory::new("unix-owner");
    std::fs::set_permissions(&directory.0, std::fs::Permissions::from_mode(0o777)).unwrap();
    if nix::unistd::geteuid().is_root() {
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65534));
    }
    let (mut listeners, gate) = (Listeners::new(vec![], true), gate());
    let path = directory.0.join("s");
    let claimed = listeners.claim(&unix("s", &path, UnixOptions::default().owner(Some(0), None)), &gate).map(drop);
    nix::unistd::setfsuid(nix::unistd::geteuid());
    let error = claimed.unwrap_err();
    assert!(error.to_string().contains("CAP_CHOWN"), "{error}");
    assert!(std::fs::symlink_metadata(&path).is_err(), "it is still there");
}

#[test]
fn abstract_and_dual_stack_addresses_are_read_back() {
    let (mut listeners, gate) = (Listeners::new(vec![], true), gate());
    let name = format!("@handover-test-{}", std::process::id());
    let wanted = unix("abstract", Path::new(&name), UnixOptions::default());
    assert_eq!(listeners.claim(&wanted, &gate).unwrap().address.to_string(), name);
    let dual = Wanted { options: WantedOptions::Tcp(TcpOptions::default().only_v6(false)), ..tcp("dual", "[::]:0") };
    let Address::Ip(address) = listeners.claim(&dual, &gate).unwrap().address else { panic!() };
    gate.open();
    std::net::TcpStream::connect(("127.0.0.1", address.port())).unwrap();
    std::net::TcpStream::connect(("::1", address.port())).unwrap();
}

/// What was settled is forgotten: its name is free again.
#[test]
fn a_name_whose_listener_was_closed_can_be_asked_for_again() {
    let (mut new, gate) =
        (Listeners::new(handed_over(&[tcp("a", "127.0.0.1:0"), tcp("b", "127.0.0.1:0")]), false), gate());
    new.claim(&tcp("a", "127.0.0.1:0"), &gate).unwrap();
    new.settle_unclaimed(Unclaimed::Close, &gate);
    assert_eq!(new.closed_names(), ["b"]);
    assert_eq!(new.claim(&tcp("b", "127.0.0.1:0"), &gate).unwrap().source, Source::Bound);
    assert!(new.claim(&tcp("b", "127.0.0.1:0"), &gate).is_err());
}
