//! One program for all targets: which is in HANDOVER_FUZZ. `scripts/fuzz.sh` runs it.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

/// The command, whose targets are not in the library.
#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../../src/main.rs"]
mod command;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let wanted = std::env::var("HANDOVER_FUZZ").unwrap_or_default();
    let targets = || handover::fuzz::TARGETS.iter().chain(command::fuzz::TARGETS);
    let found = targets().find(|(name, _)| *name == wanted);
    let names = || targets().map(|(name, _)| *name).collect::<Vec<_>>().join(" ");
    found.unwrap_or_else(|| panic!("HANDOVER_FUZZ is one of {}", names())).1
});

fuzz_target!(|bytes: &[u8]| TARGET(bytes));
