//! Random histories of the cache against a list of registrations.

use std::sync::{Arc, Weak};

use orchestra_memory::{
    BufferManager, ManagerConfig, MemoryError, PeerId, Region, RegistrationGuard, Tier, Transport,
};
use proptest::prelude::*;

use crate::{owners::Nowhere, recorder::Recorder};

const COUNT_MAX: usize = 6;
const IDLE_BYTES_MAX: u64 = 60;

#[derive(Clone, Copy, Debug)]
enum Step {
    Register(Region),
    /// Drops one of the guards, by its number among those that there are.
    Release(usize),
    Invalidate(Region),
}

/// Few places, so that regions meet, cover and overlap each other.
fn region() -> impl Strategy<Value = Region> {
    (0_u64..12, 1_u64..6, 0_u32..3).prop_map(|(at, len, tier)| Region {
        tier: if tier == 0 { Tier::Pinned } else { Tier::Dram },
        address: 1000 + 5 * at,
        len: 5 * len,
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => region().prop_map(Step::Register),
        4 => any::<usize>().prop_map(Step::Release),
        1 => region().prop_map(Step::Invalidate),
    ]
}

/// One registration, as the model has it.
struct Known {
    region: Region,
    owner: Weak<Nowhere>,
    holders: usize,
    used: u64,
    is_stale: bool,
}

#[derive(Default)]
struct Model {
    all: Vec<Known>,
    now: u64,
    hits: u64,
    misses: u64,
    evictions: u64,
}

fn ends(region: Region) -> (u64, u64) {
    (region.address, region.address + region.len)
}

fn covers(one: Region, other: Region) -> bool {
    let ((from, to), (other_from, other_to)) = (ends(one), ends(other));
    one.tier == other.tier && from <= other_from && other_to <= to
}

fn overlaps(one: Region, other: Region) -> bool {
    let ((from, to), (other_from, other_to)) = (ends(one), ends(other));
    one.tier == other.tier && from < other_to && other_from < to
}

impl Model {
    /// The registration that a request gets: of the very region, else the first in memory that covers it.
    fn covering(&mut self, region: Region) -> Option<&mut Known> {
        let usable = self.all.iter_mut().filter(|known| !known.is_stale);
        let covering = usable.filter(|known| covers(known.region, region));
        covering.min_by_key(|known| (known.region != region, known.region))
    }

    fn evict(&mut self, at: usize) {
        self.all.remove(at);
        self.evictions += 1;
    }

    fn oldest(&self) -> Option<usize> {
        let idle = (0..self.all.len()).filter(|at| self.all[*at].holders == 0);
        idle.min_by_key(|at| self.all[*at].used)
    }

    fn idle_bytes(&self) -> u64 {
        let idle = self.all.iter().filter(|known| known.holders == 0);
        idle.map(|known| known.region.len).sum()
    }

    /// Whether a request may be met; the region of the registration that it gets.
    fn register(&mut self, region: Region, owner: Weak<Nowhere>) -> Option<Region> {
        if let Some(known) = self.covering(region) {
            known.holders += 1;
            let found = known.region;
            self.hits += 1;
            return Some(found);
        }
        let is_outgrown =
            |known: &Known| known.holders == 0 && !known.is_stale && overlaps(known.region, region);
        while let Some(at) = self.all.iter().position(is_outgrown) {
            self.evict(at);
        }
        while self.all.len() >= COUNT_MAX {
            let oldest = self.oldest()?;
            self.evict(oldest);
        }
        self.misses += 1;
        self.all.push(Known {
            region,
            owner,
            holders: 1,
            used: 0,
            is_stale: false,
        });
        Some(region)
    }

    fn release(&mut self, owner: &Weak<Nowhere>) {
        self.now += 1;
        let at = self
            .all
            .iter()
            .position(|known| known.owner.ptr_eq(owner))
            .unwrap();
        let known = &mut self.all[at];
        known.holders -= 1;
        if known.holders > 0 {
            return;
        }
        known.used = self.now;
        if known.is_stale {
            self.all.remove(at);
            return;
        }
        while self.idle_bytes() > IDLE_BYTES_MAX {
            let oldest = self.oldest().unwrap();
            self.evict(oldest);
        }
    }

    fn invalidate(&mut self, region: Region) -> usize {
        let mut invalidated = 0;
        self.all.retain_mut(|known| {
            if known.is_stale || !overlaps(known.region, region) {
                return true;
            }
            invalidated += 1;
            known.is_stale = true;
            known.holders > 0
        });
        invalidated
    }
}

struct World {
    manager: BufferManager,
    recorder: Arc<Recorder>,
    /// With the owner of the registration that each has got.
    guards: Vec<(RegistrationGuard, Weak<Nowhere>)>,
    model: Model,
    epoch: u64,
}

impl World {
    fn new() -> Self {
        let recorder = Arc::new(Recorder::default());
        let config = ManagerConfig {
            max_registrations: COUNT_MAX,
            idle_registration_bytes_max: IDLE_BYTES_MAX,
            ..ManagerConfig::default()
        };
        let transports: Vec<Arc<dyn Transport>> = vec![Arc::clone(&recorder) as _];
        Self {
            manager: BufferManager::new(PeerId(0), config, transports).unwrap(),
            recorder,
            guards: Vec::new(),
            model: Model::default(),
            epoch: 0,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Register(region) => {
                let owner = Arc::new(Nowhere(region));
                let weak = Arc::downgrade(&owner);
                let expected = self.model.register(region, weak);
                let got = self.manager.register_external(owner);
                if let Some(found) = expected {
                    let guard = got.unwrap();
                    assert_eq!(guard.region(), region);
                    let is_found = |known: &&Known| known.region == found && !known.is_stale;
                    let known = self.model.all.iter().find(is_found).unwrap();
                    self.guards.push((guard, Weak::clone(&known.owner)));
                } else {
                    let (what, limit) = ("registrations", COUNT_MAX);
                    let full = MemoryError::LimitReached { what, limit };
                    assert_eq!(got.map(drop), Err(full));
                }
            }
            Step::Release(at) if !self.guards.is_empty() => {
                let (guard, owner) = self.guards.swap_remove(at % self.guards.len());
                self.model.release(&owner);
                drop(guard);
            }
            Step::Release(_) => {}
            Step::Invalidate(region) => {
                self.epoch += 1;
                let expected = self.model.invalidate(region);
                assert_eq!(self.manager.invalidate(region), expected);
            }
        }
        self.check();
    }

    fn check(&self) {
        let stats = self.manager.stats().registrations;
        let model = &self.model;
        let held = model.all.iter().filter(|known| known.holders > 0).count();
        let bytes: u64 = model.all.iter().map(|known| known.region.len).sum();
        assert_eq!(
            (stats.count, stats.held, stats.bytes),
            (model.all.len(), held, bytes)
        );
        let counted = (stats.hits, stats.misses, stats.evictions, stats.epoch);
        let expected = (model.hits, model.misses, model.evictions, self.epoch);
        assert_eq!(counted, expected);
        let mut regions: Vec<_> = model.all.iter().map(|known| known.region).collect();
        regions.sort_unstable();
        assert_eq!(self.recorder.regions(), regions, "what transports have");
        let is_alive = |known: &Known| known.owner.strong_count() > 0;
        assert!(model.all.iter().all(is_alive), "registered memory is kept");
        for (guard, owner) in &self.guards {
            let known = model
                .all
                .iter()
                .find(|known| known.owner.ptr_eq(owner))
                .unwrap();
            assert_eq!(guard.is_stale(), known.is_stale);
        }
    }
}

proptest! {
    #[test]
    fn the_cache_is_a_list_of_registrations(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
        }
        let owners: Vec<_> = world.model.all.iter().map(|known| Weak::clone(&known.owner)).collect();
        let World { manager, recorder, guards, .. } = world;
        drop(guards);
        for tier in [Tier::Dram, Tier::Pinned] {
            manager.invalidate(Region { tier, address: 0, len: u64::MAX });
        }
        prop_assert!(recorder.regions().is_empty());
        prop_assert!(owners.iter().all(|owner| owner.strong_count() == 0), "memory is given back");
    }
}
