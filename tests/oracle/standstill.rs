//! Time in which this machine ran nobody: neither the server nor whoever waits for it.
//!
//! A kernel can be so busy with itself that no process runs for a minute (docs/reliability.md). A request that was on its
//! way is answered late then, and by no fault of the server. So such time is no part of anybody's patience, and a tally
//! says how much of it there was. It is told by a thread that wakes several times a second and does nothing else: where
//! that comes seconds late, nobody can have been waited for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(200);
/// A busy machine is late by less, and that is no excuse.
const STANDSTILL: Duration = Duration::from_secs(3);

#[derive(Debug)]
struct Watch {
    since: Instant,
    last_tick_us: AtomicU64,
    stood_still_us: AtomicU64,
}

impl Watch {
    fn new(since: Instant) -> Self {
        Self { since, last_tick_us: AtomicU64::new(0), stood_still_us: AtomicU64::new(0) }
    }

    fn gap_us(&self, now: Instant) -> (u64, u64) {
        let now_us = us(now.saturating_duration_since(self.since));
        let gap_us = now_us.saturating_sub(self.last_tick_us.load(Ordering::SeqCst));
        (now_us, if gap_us >= us(STANDSTILL) { gap_us } else { 0 })
    }

    fn tick(&self, now: Instant) {
        let (now_us, gap_us) = self.gap_us(now);
        self.stood_still_us.fetch_add(gap_us, Ordering::SeqCst);
        self.last_tick_us.store(now_us, Ordering::SeqCst);
    }

    /// Also what the thread has not seen yet because it runs again only after whoever asks.
    fn so_far(&self, now: Instant) -> Duration {
        let stood_still_us = self.stood_still_us.load(Ordering::SeqCst);
        Duration::from_micros(stood_still_us + self.gap_us(now).1)
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// How long it has stood still since this was first asked.
pub fn so_far() -> Duration {
    static WATCH: OnceLock<Arc<Watch>> = OnceLock::new();
    let watch = WATCH.get_or_init(|| {
        let watch = Arc::new(Watch::new(Instant::now()));
        let ticks = Arc::clone(&watch);
        let tick = move || loop {
            thread::sleep(TICK);
            ticks.tick(Instant::now());
        };
        thread::Builder::new().name("standstill".to_owned()).spawn(tick).expect("a thread can be started");
        watch
    });
    watch.so_far(Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tick_that_comes_seconds_late_is_a_standstill() {
        let begun = Instant::now();
        let watch = Watch::new(begun);
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        watch.tick(at(1));
        assert_eq!(watch.so_far(at(3)), Duration::ZERO);
        assert_eq!(watch.so_far(at(61)), Duration::from_secs(60));
        watch.tick(at(61));
        watch.tick(at(62));
        assert_eq!(watch.so_far(at(63)), Duration::from_secs(60));
        watch.tick(at(66));
        assert_eq!(watch.so_far(at(66)), Duration::from_secs(64));
    }
}
