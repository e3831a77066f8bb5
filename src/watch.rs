//! A value that others wait for: by blocking with a deadline, or as a future of any runtime.

use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

/// Locks, also after a panic elsewhere: what our locks guard is never left half-changed.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Watch<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    value: T,
    /// One place per future that waits, so that ten thousand of them register in constant time each.
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
}

impl<T> Watch<T> {
    pub(crate) fn new(value: T) -> Self {
        let state = State { value, wakers: Vec::new(), free: Vec::new() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut T)) {
        let wakers: Vec<Waker> = {
            let mut state = lock(&self.state);
            change(&mut state.value);
            state.wakers.iter_mut().filter_map(Option::take).collect()
        };
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn read<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&lock(&self.state).value)
    }

    /// Blocks until `look` finds something, or until `deadline`.
    pub(crate) fn wait<R>(&self, deadline: Option<Instant>, look: impl Fn(&T) -> Option<R>) -> Option<R> {
        let mut state = lock(&self.state);
        loop {
            if let Some(found) = look(&state.value) {
                return Some(found);
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Completes when `look` finds something.
    pub(crate) fn future<R, F>(self: Arc<Self>, look: F) -> Found<T, F>
    where
        F: Fn(&T) -> Option<R> + Unpin,
    {
        Found { watch: self, look, slot: None }
    }
}

/// The future of [`Watch::future`].
pub(crate) struct Found<T, F> {
    watch: Arc<Watch<T>>,
    look: F,
    slot: Option<usize>,
}

impl<T, R, F: Fn(&T) -> Option<R> + Unpin> Future for Found<T, F> {
    type Output = R;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<R> {
        let this = &mut *self;
        let mut state = lock(&this.watch.state);
        if let Some(found) = (this.look)(&state.value) {
            return Poll::Ready(found);
        }
        let slot = match this.slot.or_else(|| state.free.pop()) {
            Some(slot) => slot,
            None => {
                state.wakers.push(None);
                state.wakers.len() - 1
            }
        };
        this.slot = Some(slot);
        match &mut state.wakers[slot] {
            Some(waker) if waker.will_wake(context.waker()) => {}
            place => *place = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

impl<T, F> Drop for Found<T, F> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            let mut state = lock(&self.watch.state);
            state.wakers[slot] = None;
            state.free.push(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;
    use std::time::Duration;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn at_least(minimum: u32) -> impl Fn(&u32) -> Option<u32> + Unpin {
        move |value| (*value >= minimum).then_some(*value)
    }

    #[test]
    fn a_future_is_woken_once_per_change_and_frees_its_place() {
        let watch = Arc::new(Watch::new(0));
        let count = Arc::new(Count::default());
        let waker = Waker::from(count.clone());
        let mut context = Context::from_waker(&waker);
        let mut future = watch.clone().future(at_least(2));
        assert!(Pin::new(&mut future).poll(&mut context).is_pending());
        assert!(Pin::new(&mut future).poll(&mut context).is_pending());
        watch.update(|value| *value = 1);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(Pin::new(&mut future).poll(&mut context).is_pending());
        watch.update(|value| *value = 2);
        assert_eq!(Pin::new(&mut future).poll(&mut context), Poll::Ready(2));
        drop(future);
        let mut next = watch.clone().future(at_least(9));
        assert!(Pin::new(&mut next).poll(&mut context).is_pending());
        assert_eq!(lock(&watch.state).wakers.len(), 1);
    }

    #[test]
    fn waiting_ends_at_the_deadline_or_at_the_value() {
        let watch = Arc::new(Watch::new(0));
        let soon = Instant::now() + Duration::from_millis(5);
        assert_eq!(watch.wait(Some(soon), at_least(1)), None);
        let other = watch.clone();
        let thread = std::thread::spawn(move || other.wait(None, at_least(1)));
        watch.update(|value| *value = 7);
        assert_eq!(thread.join().unwrap(), Some(7));
    }
}
