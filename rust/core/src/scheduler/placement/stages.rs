//! Spreads the stages of a pipeline that no single domain can hold, neighbours close to each other.
//!
//! Each hop from one stage to the next crosses a domain or a rack where it has to. Stages that share a domain follow
//! each other, and so do domains that share a rack; so there are as many hops between racks as racks less one. Taking
//! the racks with most room first makes them as few as can be, and the same holds for the domains of each rack. What
//! the last one of them has to take goes where it fits most tightly.
//!
//! Complexity: O(D log D + D·G) for the D domains where a stage may fit.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{
    GpuPool,
    find::{Ask, Counting},
};

/// A domain's rack; domains without one are apart from all others.
pub(super) type Rack<'a> = (Option<&'a str>, Option<u32>);

impl GpuPool {
    /// Domains and how many of the stages each takes, neighbours next to each other. `None` where they do not fit.
    pub(super) fn spread(&self, ask: &Ask) -> Option<Vec<(u32, usize)>> {
        let free = Counting::Below(0);
        let mut racks: BTreeMap<Rack<'_>, Vec<(u32, usize)>> = BTreeMap::new();
        for domain in self.candidates(ask, ask.num_gpus, free) {
            let num_stages = self.num_usable(domain, ask, free) / ask.num_gpus;
            if num_stages > 0 {
                let rack = racks.entry(self.rack(domain)).or_default();
                rack.push((domain, num_stages));
            }
        }
        let sum = |domains: &[(u32, usize)]| domains.iter().map(|(_, stages)| stages).sum();
        let sums = racks.iter().map(|(&rack, domains)| (rack, sum(domains)));
        let mut spread = Vec::new();
        for (rack, num_stages) in fewest(sums.collect(), ask.num_stages)? {
            spread.extend(fewest(racks.remove(&rack)?, num_stages)?);
        }
        Some(spread)
    }

    pub(super) fn rack(&self, domain: u32) -> Rack<'_> {
        let rack = self.domains[domain as usize].as_ref();
        let rack = rack.and_then(|domain| domain.rack.as_deref());
        (rack, rack.is_none().then_some(domain))
    }
}

/// The fewest of the offers that hold `wanted` together, and what each holds: the largest first, and for what is left
/// the tightest. `None` where all together are too small.
fn fewest<T: Ord + Copy>(mut offers: Vec<(T, usize)>, wanted: usize) -> Option<Vec<(T, usize)>> {
    offers.sort_unstable_by_key(|&(name, size)| (Reverse(size), Reverse(name)));
    let mut left = wanted;
    let mut taken = Vec::new();
    for (index, &(name, size)) in offers.iter().enumerate() {
        if size >= left {
            let num_enough = offers[index..].partition_point(|&(_, size)| size >= left);
            taken.push((offers[index + num_enough - 1].0, left));
            return Some(taken);
        }
        taken.push((name, size));
        left -= size;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewest_are_the_largest_and_the_last_is_the_tightest() {
        let offers = || vec![('a', 2), ('b', 5), ('c', 3), ('d', 3)];
        assert_eq!(fewest(offers(), 3), Some(vec![('c', 3)]));
        assert_eq!(fewest(offers(), 7), Some(vec![('b', 5), ('a', 2)]));
        assert_eq!(
            fewest(offers(), 13),
            Some(vec![('b', 5), ('d', 3), ('c', 3), ('a', 2)])
        );
        assert_eq!(fewest(offers(), 14), None);
    }
}
