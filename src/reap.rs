//! Children that have ended.

use std::thread;

use crate::fault;

/// Reaps in a thread of its own: while others read /proc the kernel makes whoever reaps wait, for half a minute on a busy
/// machine (Linux 6.18, `shrink_dcache_parent`). Where no thread can be had, here.
pub(crate) fn aside(reap: impl FnOnce() + Clone + Send + 'static) {
    let thread = thread::Builder::new().name("handover-reaps".to_owned()).stack_size(64 * 1024);
    let in_thread = reap.clone();
    let started = thread.spawn(|| {
        fault::reached("reaps", None);
        in_thread();
    });
    if started.is_err() {
        reap();
    }
}
