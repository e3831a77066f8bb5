use super::*;
use crate::garbled::garbled;

fn offer() -> Offer {
    Offer {
        protocol: VERSIONS,
        generation: 2,
        pid: 4100,
        listeners: vec![
            OfferedListener {
                name: "http".into(),
                kind: Kind::Tcp,
                address: OfferedAddress::Ip("0.0.0.0:8080".parse().unwrap()),
                cookie: 8193,
                path: None,
                backlog: Some(4096),
                activated: true,
            },
            OfferedListener {
                name: "admin".into(),
                kind: Kind::Unix,
                address: OfferedAddress::Text("/run/app/admin.sock".into()),
                cookie: 8194,
                path: Some(PathIdentity { device: 26, inode: 1811 }),
                backlog: None,
                activated: false,
            },
        ],
        state: Some(OfferedState { version: 3, length: 120 }),
        stderr: true,
        draining: vec![DrainingGeneration { pid: 4001, generation: 1 }],
        ready_timeout_ms: 30_000,
        trial_ms: 1000,
        build: None,
        program: None,
        restart: None,
    }
}

fn offer_with_builds() -> Offer {
    let path = "/srv/app/releases/41/server".into();
    let build = BuildIdentity { path, device: 26, inode: 1812, size: 4_194_304, modified_unix_ms: 1_763_900_000_000 };
    Offer { build: Some(build), program: Some("/srv/app/current/server".into()), ..offer() }
}

fn adopted(restart: bool) -> Message {
    let listeners = vec![AdoptedListener { name: "http".into(), cookie: u64::MAX }];
    Message::Adopted { protocol: 1, listeners, restart }
}

/// What version 1 has got since its first frames were recorded, under the names of the recordings.
fn later_messages() -> [(&'static str, Message); 3] {
    let restart = OfferedRestart { kill_after_ms: 10_000, asked_us: 86_400_000_000, asker: true };
    let offer_of_restart = Offer { state: None, restart: Some(restart), ..offer_with_builds() };
    [
        ("offer-with-builds", Message::Offer(offer_with_builds().into())),
        ("offer-of-restart", Message::Offer(offer_of_restart.into())),
        ("adopted-for-restart", adopted(true)),
    ]
}

fn every_message() -> Vec<Message> {
    vec![
        Message::Offer(offer().into()),
        adopted(false),
        Message::Refused { reason: "too new".into(), protocol: Some(Versions { min: 2, max: 3 }) },
        Message::Starting { reason: "warming the cache".into() },
        Message::GaveUp { reason: "no database".into() },
        Message::Ready(Claims {
            kept: vec!["http".into()],
            added: vec!["http2".into()],
            unclaimed: vec!["admin".into()],
        }),
        Message::Commit,
        Message::Accepting { listeners: vec!["http".into()] },
        Message::Settled,
        Message::Aborted { reason: "stopped".into() },
        Message::Stopping,
    ]
}

fn decode(bytes: &[u8]) -> Result<Message, Malformed> {
    let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a header");
    let header = Header::decode(*header)?;
    assert_eq!(header.body_bytes, body.len());
    Message::decode(header, body)
}

#[test]
fn every_message_survives_the_wire() {
    for message in every_message().into_iter().chain(later_messages().map(|(_, message)| message)) {
        assert_eq!(decode(&message.encode().unwrap()), Ok(message));
    }
}

/// Frames of released versions must be understood for ever. `HANDOVER_RECORD=1` writes those that are missing.
#[test]
fn recorded_frames_decode() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/frames/1");
    let recorded = every_message().into_iter().map(|message| (message.name(), message));
    for (name, message) in recorded.chain(later_messages()) {
        let path = directory.join(name);
        if std::env::var_os("HANDOVER_RECORD").is_some() && !path.exists() {
            std::fs::write(&path, message.encode().unwrap()).unwrap();
        }
        assert_eq!(decode(&std::fs::read(path).unwrap()), Ok(message));
    }
}

/// Another language may know no more of a file than where it is.
#[test]
fn a_build_is_known_by_device_and_inode_alone() {
    let file = std::env::current_exe().unwrap().metadata().unwrap();
    let text = format!(r#"{{"path":"/x","device":{},"inode":{}}}"#, file.dev(), file.ino());
    let build: BuildIdentity = serde_json::from_str(&text).unwrap();
    assert!(build.is(&file));
    // The same number, given to another file.
    assert!(!BuildIdentity { size: 1, ..build.clone() }.is(&file));
    assert!(!BuildIdentity { modified_unix_ms: 1, ..build.clone() }.is(&file));
    assert!(!BuildIdentity { inode: file.ino() + 1, ..build }.is(&file));
}

#[test]
fn unknown_fields_are_ignored_and_unknown_kinds_refused() {
    let body = br#"{"reason":"x","since":"version 7"}"#;
    let header = Header { kind: 4, body_bytes: body.len(), fds: 0 };
    assert_eq!(Message::decode(header, body), Ok(Message::Starting { reason: "x".into() }));
    let error = Message::decode(Header { kind: 77, ..header }, body).unwrap_err();
    assert!(error.0.contains("kind 77"), "{error}");
}

#[test]
fn bounds_and_magic_are_enforced() {
    let good = Header { kind: 7, body_bytes: 2, fds: 0 };
    assert_eq!(Header::decode(good.encode()), Ok(good));
    for bad in [Header { body_bytes: BODY_BYTES_MAX + 1, ..good }, Header { fds: FDS_MAX + 1, ..good }] {
        assert!(Header::decode(bad.encode()).is_err());
    }
    assert!(Header::decode(*b"GET / HTTP/1.1\r\n").is_err());
}

#[test]
fn a_count_of_fds_that_does_not_fit_the_body_is_refused() {
    let body = serde_json::to_vec(&offer()).unwrap();
    for fds in [0, 3, 5] {
        let error = Message::decode(Header { kind: 1, body_bytes: body.len(), fds }, &body).unwrap_err();
        assert!(error.0.contains("instead of 4"), "{error}");
    }
    assert!(Message::decode(Header { kind: 7, body_bytes: 2, fds: 1 }, b"{}").is_err());
}

#[test]
fn bodies_that_are_no_objects_are_refused() {
    for body in [&b"[]"[..], b"", b"null", b"{", b"[\"x\"]"] {
        assert!(Message::decode(Header { kind: 4, body_bytes: body.len(), fds: 0 }, body).is_err(), "{body:?}");
    }
}

#[test]
fn the_highest_common_version_is_chosen() {
    let range = |min, max| Versions { min, max };
    assert_eq!(range(1, 3).common(range(2, 9)), Some(3));
    assert_eq!(range(4, 9).common(range(1, 4)), Some(4));
    assert_eq!(range(1, 1).common(range(2, 3)), None);
}

#[test]
fn names_fit_into_listen_fdnames() {
    assert!(name_is_valid("http"));
    assert!(name_is_valid("ünïcode name"));
    for bad in ["", "a:b", "a\nb", &"x".repeat(256)] {
        assert!(!name_is_valid(bad), "{bad:?}");
    }
}

#[test]
fn the_versions_of_an_offer_are_read_whatever_else_it_says() {
    let body = br#"{"protocol":{"min":7,"max":9},"sockets":"elsewhere"}"#;
    let header = Header { kind: 1, body_bytes: body.len(), fds: 3 };
    assert_eq!(header.offered_versions(body), Some(Versions { min: 7, max: 9 }));
    assert_eq!(Header { kind: 2, ..header }.offered_versions(body), None);
}

proptest::proptest! {
    /// Whatever arrives is read or refused, and what is read is what was written.
    #[test]
    fn garbled_frames_do_no_harm(bytes in garbled(every_message().iter().map(|message| message.encode().unwrap()).collect())) {
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return Ok(()) };
        let Ok(header) = Header::decode(*header) else { return Ok(()) };
        assert!(header.body_bytes <= BODY_BYTES_MAX && header.fds <= FDS_MAX);
        let _ = header.offered_versions(body);
        if let Ok(message) = Message::decode(header, body) {
            assert_eq!(decode(&message.encode().unwrap()), Ok(message));
        }
    }
}
