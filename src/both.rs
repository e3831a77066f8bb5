//! Two things at the same time: what an upgrade with thousands of listeners waits for is mostly the processor.

use std::thread::{Builder, scope};

/// Does `there` on a thread of its own meanwhile, or afterwards if no thread is to be had.
pub(crate) fn both<A, B: Send>(here: impl FnOnce() -> A, there: impl Fn() -> B + Sync) -> (A, B) {
    let (first, second) = scope(|scope| {
        let other = Builder::new().spawn_scoped(scope, &there);
        (here(), other.ok().and_then(|other| other.join().ok()))
    });
    (first, second.unwrap_or_else(there))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn both_are_done_at_the_same_time() {
        let barrier = Barrier::new(2);
        let meet = || barrier.wait().is_leader();
        let (here, there) = both(meet, meet);
        assert!(here != there);
    }
}
