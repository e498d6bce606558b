//! Which registrations there are, found by region, by range and by age.

use std::{collections::BTreeMap, sync::Arc};

use rustc_hash::FxHashMap;

use super::{Limits, Region, RegistrationStats};
use crate::{error::MemoryError, slab::Slab, tier::Tier, transport::SlabId};

pub(super) struct Entry {
    pub(super) slab: Arc<Slab>,
    pub(super) region: Region,
    pub(super) holders: usize,
    /// When somebody held it last, in ticks of the cache.
    pub(super) used: u64,
    pub(super) is_stale: bool,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) entries: FxHashMap<SlabId, Entry>,
    /// Those that are not stale.
    by_region: FxHashMap<Region, SlabId>,
    /// The same by tier and address, for questions about ranges.
    by_address: BTreeMap<(Tier, u64, u64), SlabId>,
    /// No registration since the last time that there were none was longer.
    longest: u64,
    pub(super) idle_bytes: u64,
    pub(super) ticks: u64,
    pub(super) stats: RegistrationStats,
}

impl State {
    /// The registration that covers a region.
    pub(super) fn covering(&self, region: Region) -> Option<SlabId> {
        if let Some(id) = self.by_region.get(&region) {
            return Some(*id);
        }
        let ids = self.starting_before(region, region.address.saturating_add(1));
        let mut covering = ids.filter(|(known, _)| known.covers(&region));
        covering.next().map(|(_, id)| id)
    }

    pub(super) fn overlapping(&self, region: Region) -> Vec<SlabId> {
        let ids = self.starting_before(region, region.end());
        let overlapping = ids.filter(|(known, _)| known.overlaps(&region));
        overlapping.map(|(_, id)| id).collect()
    }

    /// Registrations of a region's tier that start before `end` and may reach into it.
    fn starting_before(&self, region: Region, end: u64) -> impl Iterator<Item = (Region, SlabId)> {
        let tier = region.tier;
        let first = region.address.saturating_sub(self.longest);
        let range = self.by_address.range((tier, first, 0)..(tier, end, 0));
        range.map(|(&(tier, address, len), id)| {
            let known = Region { tier, address, len };
            (known, *id)
        })
    }

    /// Gives up idle registrations that the new one overlaps, and the oldest where there are too many.
    pub(super) fn make_room(
        &mut self,
        region: Region,
        limits: Limits,
    ) -> Result<Vec<Arc<Slab>>, MemoryError> {
        if self.stats.held >= limits.count {
            let (what, limit) = ("registrations", limits.count);
            return Err(MemoryError::LimitReached { what, limit });
        }
        let ids = self.overlapping(region);
        let idle: Vec<_> = ids.into_iter().filter(|id| self.is_idle(*id)).collect();
        let mut gone: Vec<_> = idle.into_iter().filter_map(|id| self.evict(id)).collect();
        gone.extend(self.evict_until(|state| state.entries.len() < limits.count));
        Ok(gone)
    }

    pub(super) fn evict_until(&mut self, is_enough: impl Fn(&Self) -> bool) -> Vec<Arc<Slab>> {
        let mut gone = Vec::new();
        while !is_enough(self) {
            let idle = self.entries.iter().filter(|(_, entry)| entry.holders == 0);
            let Some(oldest) = idle.min_by_key(|(_, entry)| entry.used).map(|(id, _)| *id) else {
                break;
            };
            gone.extend(self.evict(oldest));
        }
        gone
    }

    fn is_idle(&self, id: SlabId) -> bool {
        self.entries
            .get(&id)
            .is_some_and(|entry| entry.holders == 0)
    }

    fn evict(&mut self, id: SlabId) -> Option<Arc<Slab>> {
        self.stats.evictions += 1;
        self.remove(id)
    }

    pub(super) fn insert(&mut self, slab: Arc<Slab>, region: Region) {
        let id = slab.id();
        let Region { tier, address, len } = region;
        self.by_region.insert(region, id);
        self.by_address.insert((tier, address, len), id);
        self.longest = self.longest.max(len);
        self.stats.count += 1;
        self.stats.bytes += len;
        self.idle_bytes += len;
        let entry = Entry {
            slab,
            region,
            holders: 0,
            used: self.ticks,
            is_stale: false,
        };
        self.entries.insert(id, entry);
    }

    /// Makes a registration one that nobody finds; its slab where nobody holds it either.
    pub(super) fn invalidate(&mut self, id: SlabId) -> Option<Arc<Slab>> {
        self.forget(id);
        let entry = self.entries.get_mut(&id)?;
        entry.is_stale = true;
        if entry.holders > 0 {
            return None;
        }
        self.remove(id)
    }

    fn forget(&mut self, id: SlabId) {
        let Some(entry) = self.entries.get(&id).filter(|entry| !entry.is_stale) else {
            return;
        };
        let region = entry.region;
        let Region { tier, address, len } = region;
        self.by_region.remove(&region);
        self.by_address.remove(&(tier, address, len));
        if self.by_address.is_empty() {
            self.longest = 0;
        }
    }

    /// Takes out a registration that nobody holds.
    pub(super) fn remove(&mut self, id: SlabId) -> Option<Arc<Slab>> {
        self.forget(id);
        let entry = self.entries.remove(&id)?;
        debug_assert_eq!(entry.holders, 0, "held ones stay");
        self.stats.count -= 1;
        self.stats.bytes -= entry.region.len;
        self.idle_bytes -= entry.region.len;
        Some(entry.slab)
    }
}
