//! What happened in a run, in a form that two runs can be compared by.

use std::{cell::RefCell, collections::BTreeMap, fmt::Write as _, rc::Rc};

/// Counts of what happened, and a fingerprint of the order in which it did. Clones share it; all hosts run on one
/// thread.
#[derive(Clone, Default)]
pub(crate) struct Trace(Rc<RefCell<Inner>>);

#[derive(Default)]
struct Inner {
    counts: BTreeMap<&'static str, u64>,
    fingerprint: u64,
}

impl Trace {
    /// `what` happened, with a number that tells it from others of its kind.
    pub(crate) fn note(&self, what: &'static str, detail: u64) {
        let mut inner = self.0.borrow_mut();
        *inner.counts.entry(what).or_default() += 1;
        let now = turmoil::sim_elapsed().map_or(0, |elapsed| elapsed.as_millis() as u64);
        for word in [what.len() as u64, detail, now] {
            inner.fingerprint = mix(inner.fingerprint ^ word);
        }
    }

    pub(crate) fn count(&self, what: &str) -> u64 {
        self.0.borrow().counts.get(what).copied().unwrap_or(0)
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        self.0.borrow().fingerprint
    }

    /// One line: every count by its name.
    pub(crate) fn summary(&self) -> String {
        let inner = self.0.borrow();
        inner
            .counts
            .iter()
            .fold(String::new(), |mut line, (what, count)| {
                write!(line, "{what} {count}, ").unwrap();
                line
            })
    }
}

/// The finaliser of `splitmix64` (Steele, Lea and Flood, OOPSLA 2014).
pub(crate) const fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// The token at `index` of what is drawn with `seed`: like a model's, a function of the two alone. A lower-case letter
/// of the fixtures' tokeniser, so that the text can be checked as well.
pub(crate) const fn token(seed: u64, index: u32) -> u32 {
    b'a' as u32 + (mix(seed ^ ((index as u64) << 32)) % 26) as u32
}
