//! Memory that threads compute in, kept between calls: to get it anew takes as long as a small call.

use std::{
    mem,
    ops::{Deref, DerefMut},
};

use parking_lot::Mutex;

/// What a thread computes in; the default takes no memory.
pub(crate) trait Spare: Default {
    /// Gives back what is the thread's own.
    fn leave_thread(&mut self) {}
}

/// What no thread has at the moment; as many are made as threads have had one at a time.
#[derive(Default)]
pub(crate) struct Spares<T>(Mutex<Vec<T>>);

impl<T: Spare> Spares<T> {
    /// One of them, or what `make` makes; it comes back, as it then is, when it is dropped.
    pub(crate) fn take(&self, make: impl FnOnce() -> T) -> Lent<'_, T> {
        let spare = self.0.lock().pop();
        Lent {
            value: spare.unwrap_or_else(make),
            home: self,
        }
    }
}

/// One that a thread has for a while.
pub(crate) struct Lent<'a, T: Spare> {
    value: T,
    home: &'a Spares<T>,
}

impl<T: Spare> Deref for Lent<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Spare> DerefMut for Lent<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: Spare> Drop for Lent<'_, T> {
    fn drop(&mut self) {
        self.value.leave_thread();
        self.home.0.lock().push(mem::take(&mut self.value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Spare for Vec<u8> {
        fn leave_thread(&mut self) {
            self.push(0);
        }
    }

    #[test]
    fn two_at_a_time_are_two_and_the_next_is_one_of_them() {
        let spares = Spares::default();
        let (first, second) = (spares.take(|| vec![1]), spares.take(|| vec![2]));
        assert_eq!((&*first, &*second), (&vec![1], &vec![2]));
        drop(first);
        let mut again = spares.take(Vec::new);
        assert_eq!(*again, [1, 0]);
        again.clear();
        drop(again);
        assert_eq!(*spares.take(Vec::new), [0]);
    }
}
