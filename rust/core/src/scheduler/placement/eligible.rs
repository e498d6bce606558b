//! Which domains have enough GPUs with enough room: one answer per request, no scan.
//!
//! For every size class `c` and every `k`, a bitmap holds the domains with at least `k` GPUs in class `c`. A GPU that
//! enters or leaves a class changes its domain's count by one, and so exactly one bit. Where the request's size is
//! no threshold, domains of the class above are sure to fit, and those that are only in the class below are counted
//! exactly; so first fit is the true one, and no fitting domain is missed.
//!
//! Complexity, for D domains of G GPUs: `set` O(classes crossed); `domain` O(D/64) words, for wide gangs of each class
//! up to the answer, plus O(G) for each domain that is counted before the answer.

use super::{classes::SizeClasses, memory::End};

/// What an index is large enough for. Growing rebuilds it; sizes double, so that is rare.
#[expect(clippy::struct_field_names, reason = "they are numbers of things")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) num_domains: usize,
    /// GPUs of the widest domain.
    pub(super) num_slots: usize,
    pub(super) num_classes: usize,
}

impl Shape {
    fn num_words(self) -> usize {
        self.num_domains.div_ceil(64)
    }
}

/// Domains by how many of their GPUs have how much of one kind of room.
#[derive(Clone, Debug, Default)]
pub(super) struct EligibleDomains {
    shape: Shape,
    /// Room of each GPU in units: `[domain][slot]`, 0 where there is no GPU or it may not be used.
    rooms: Vec<u32>,
    /// GPUs of a domain in a class: `[domain][class]`.
    counts: Vec<u8>,
    /// Bit `d`: domain `d` has at least `k` GPUs in the class: `[class][k - 1][word]`.
    bits: Vec<u64>,
    /// Domains with at least `k` GPUs in the class: `[class][k - 1]`.
    num_domains: Vec<u32>,
}

impl EligibleDomains {
    /// The same content in a larger shape.
    pub(super) fn reshape(&mut self, shape: Shape, classes: &SizeClasses) {
        let old = std::mem::replace(
            self,
            Self {
                shape,
                rooms: vec![0; shape.num_domains * shape.num_slots],
                counts: vec![0; shape.num_domains * shape.num_classes],
                bits: vec![0; shape.num_classes * shape.num_slots * shape.num_words()],
                num_domains: vec![0; shape.num_classes * shape.num_slots],
            },
        );
        for domain in 0..old.shape.num_domains {
            for (slot, &room) in old.domain_rooms(domain as u32).iter().enumerate() {
                self.set(domain as u32, slot, room, classes);
            }
        }
    }

    /// Room of each GPU of the domain, by slot.
    pub(super) fn domain_rooms(&self, domain: u32) -> &[u32] {
        let start = domain as usize * self.shape.num_slots;
        &self.rooms[start..start + self.shape.num_slots]
    }

    /// Says how much room a GPU has now.
    pub(super) fn set(&mut self, domain: u32, slot: usize, room: u32, classes: &SizeClasses) {
        let domain = domain as usize;
        let cell = &mut self.rooms[domain * self.shape.num_slots + slot];
        if *cell == room {
            return;
        }
        let (before, after) = (classes.num_held(*cell), classes.num_held(room));
        *cell = room;
        let Shape {
            num_slots,
            num_classes,
            ..
        } = self.shape;
        let (word, bit) = (domain / 64, 1 << (domain % 64));
        for class in before.min(after)..before.max(after) {
            let count = &mut self.counts[domain * num_classes + class];
            // The one `k` whose "at least k" changes.
            let rank = if after > before {
                *count += 1;
                usize::from(*count) - 1
            } else {
                *count -= 1;
                usize::from(*count)
            };
            let row = class * num_slots + rank;
            self.bits[row * self.shape.num_words() + word] ^= bit;
            if after > before {
                self.num_domains[row] += 1;
            } else {
                self.num_domains[row] -= 1;
            }
        }
    }

    /// A domain with at least `num_gpus` GPUs that have room for `units`: from the low end the first one, from the high
    /// end the first of those whose `num_gpus`-th GPU is in the lowest class.
    pub(super) fn domain(
        &self,
        num_gpus: usize,
        units: u32,
        end: End,
        classes: &SizeClasses,
    ) -> Option<u32> {
        let (class, is_exact) = classes.round_up(units);
        let is_counted = !is_exact && class > 0;
        let lowest = class - usize::from(is_counted);
        let row = |class: usize| self.row(class, num_gpus);
        // Of the lowest class only those that were counted are sure to fit.
        match end {
            End::Low => {
                let sure = if is_counted { row(class) } else { row(lowest) };
                first_of(row(lowest), &[], end, |domain| {
                    is_set(sure, domain) || self.count(domain, units) >= num_gpus
                })
            }
            End::High => (lowest..self.shape.num_classes).find_map(|class| {
                first_of(row(class), row(class + 1), end, |domain| {
                    class > lowest || !is_counted || self.count(domain, units) >= num_gpus
                })
            }),
        }
    }

    /// The most GPUs of one domain that have room for `units`.
    pub(super) fn widest(&self, units: u32, classes: &SizeClasses) -> u32 {
        let (class, is_exact) = classes.round_up(units);
        let sure = self.widest_in(class);
        if is_exact || class == 0 {
            return sure as u32;
        }
        let mut widest = sure;
        // Only a domain that is wider in the class below can be wider than `sure`.
        for (word, &candidates) in self.row(class - 1, sure + 1).iter().enumerate() {
            let mut candidates = candidates;
            while candidates != 0 {
                let domain = word as u32 * 64 + candidates.trailing_zeros();
                widest = widest.max(self.count(domain, units));
                candidates &= candidates - 1;
            }
        }
        widest as u32
    }

    /// The most GPUs that one domain has in the class.
    fn widest_in(&self, class: usize) -> usize {
        let start = class * self.shape.num_slots;
        let ranks = self.num_domains.get(start..start + self.shape.num_slots);
        ranks.map_or(0, |ranks| ranks.partition_point(|&domains| domains > 0))
    }

    /// GPUs of the domain with room for `units`, counted.
    fn count(&self, domain: u32, units: u32) -> usize {
        let rooms = self.domain_rooms(domain);
        rooms.iter().filter(|&&room| room >= units).count()
    }

    /// The domains with at least `num_gpus` GPUs in the class; empty where there is none.
    fn row(&self, class: usize, num_gpus: usize) -> &[u64] {
        if class >= self.shape.num_classes || num_gpus == 0 || num_gpus > self.shape.num_slots {
            return &[];
        }
        let row = class * self.shape.num_slots + num_gpus - 1;
        if self.num_domains[row] == 0 {
            return &[];
        }
        let start = row * self.shape.num_words();
        &self.bits[start..start + self.shape.num_words()]
    }

    /// The domains that may have `num_gpus` GPUs with room for `units`, as bits: all that have, and some that have
    /// nearly so much. Empty where there is none.
    pub(super) fn candidates(&self, num_gpus: usize, units: u32, classes: &SizeClasses) -> &[u64] {
        let (class, is_exact) = classes.round_up(units);
        let class = if is_exact {
            class
        } else {
            class.saturating_sub(1)
        };
        self.row(class, num_gpus)
    }

    /// Asserts that counts and bitmaps say what the rooms say.
    pub(super) fn check_integrity(&self, classes: &SizeClasses) {
        let mut rebuilt = Self {
            rooms: self.rooms.clone(),
            ..Self::default()
        };
        rebuilt.shape = self.shape;
        rebuilt.reshape(self.shape, classes);
        assert_eq!(rebuilt.counts, self.counts, "counts by class");
        assert_eq!(rebuilt.bits, self.bits, "domains by count");
        assert_eq!(rebuilt.num_domains, self.num_domains, "numbers of domains");
    }
}

/// The bits set in both, from the end.
pub(super) fn set_bits<'a>(a: &'a [u64], b: &'a [u64], end: End) -> impl Iterator<Item = u32> + 'a {
    let num_words = a.len().min(b.len());
    let words = (0..num_words).map(move |step| match end {
        End::Low => step,
        End::High => num_words - 1 - step,
    });
    words.flat_map(move |word| {
        let mut left = a[word] & b[word];
        std::iter::from_fn(move || {
            let bit = match end {
                End::Low => left.trailing_zeros(),
                End::High => left.checked_ilog2()?,
            };
            if left == 0 {
                return None;
            }
            left &= !(1 << bit);
            Some(word as u32 * 64 + bit)
        })
    })
}

fn is_set(words: &[u64], bit: u32) -> bool {
    let word = words.get(bit as usize / 64);
    word.is_some_and(|word| word >> (bit % 64) & 1 == 1)
}

/// The first domain, seen from `end`, that is in `words`, not in `except`, and fits.
fn first_of(words: &[u64], except: &[u64], end: End, fits: impl Fn(u32) -> bool) -> Option<u32> {
    for step in 0..words.len() {
        let word = match end {
            End::Low => step,
            End::High => words.len() - 1 - step,
        };
        let mut candidates = words[word] & !except.get(word).copied().unwrap_or(0);
        while candidates != 0 {
            let bit = match end {
                End::Low => candidates.trailing_zeros(),
                End::High => candidates.ilog2(),
            };
            let domain = word as u32 * 64 + bit;
            if fits(domain) {
                return Some(domain);
            }
            candidates &= !(1 << bit);
        }
    }
    None
}
