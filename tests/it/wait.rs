//! Waiting for what other processes do, always with a deadline.

use std::fmt::Debug;
use std::thread;
use std::time::{Duration, Instant};

/// Nothing that works takes so long, on however busy a machine.
pub(crate) const LONG: Duration = Duration::from_secs(30);

const INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `look` finds something.
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        thread::sleep(INTERVAL);
    }
}

/// Waits until `look` gives `wanted`.
#[track_caller]
pub(crate) fn eventually_equal<T: PartialEq + Debug>(what: &str, wanted: &T, mut look: impl FnMut() -> T) {
    let deadline = Instant::now() + LONG;
    loop {
        let found = look();
        if found == *wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {found:?} instead of {wanted:?}");
        thread::sleep(INTERVAL);
    }
}
