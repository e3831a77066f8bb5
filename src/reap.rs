//! Children that have ended.

use std::thread;

use nix::sys::signal::SigSet;

use crate::fault;

/// Reaps in a thread of its own: while others read /proc the kernel makes whoever reaps wait, for half a minute on a busy
/// machine (Linux 6.18, `shrink_dcache_parent`). Where no thread can be had, here.
pub(crate) fn aside(reap: impl FnOnce() + Clone + Send + 'static) {
    // It inherits this: a signal that it took while a supervisor replaces itself would be lost with it.
    let own_mask = SigSet::thread_get_mask();
    let _ = SigSet::all().thread_block();
    let thread = thread::Builder::new().name("handover-reaps".to_owned()).stack_size(64 * 1024);
    let in_thread = reap.clone();
    let started = thread.spawn(|| {
        fault::reached("reaps", None);
        in_thread();
    });
    let _ = own_mask.map(|mask| mask.thread_set_mask());
    if started.is_err() {
        reap();
    }
}
