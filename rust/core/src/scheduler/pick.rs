//! The policies that do not compare costs: in turn, at random, by session.

use xxhash_rust::xxh3::xxh3_64;

use super::{
    Scheduler,
    chain::Chain,
    group::Model,
    policy::{CostModel, RoutePolicy},
    route::RouteRequest,
    search::Found,
};

/// Draws before all workers are gone through; below that many misses, at least a tenth may take the request.
const NUM_DRAWS: usize = 32;

/// A request and the workers that it may choose from.
struct Pick<'a> {
    scheduler: &'a Scheduler,
    request: &'a RouteRequest<'a>,
    chains: &'a [Chain<'a>],
    /// Only workers that could start it now.
    room: bool,
}

impl Scheduler {
    /// The worker that the policy picks, and which chain is its own.
    pub(super) fn pick(
        &self,
        model: &Model,
        request: &RouteRequest<'_>,
        chains: &[Chain<'_>],
    ) -> Option<(Found, usize, CostModel)> {
        [true, false].into_iter().find_map(|room| {
            let pick = Pick {
                scheduler: self,
                request,
                chains,
                room,
            };
            match self.config.policy {
                RoutePolicy::RoundRobin => pick.next_in_turn(model),
                RoutePolicy::ConsistentHash => pick.of_session(model),
                RoutePolicy::PowerOfTwo => pick.of_two(),
                _ => pick.any(&mut self.random()),
            }
        })
    }

    /// Random numbers of the next decision: they move on with each reservation.
    fn random(&self) -> Random {
        Random(self.config.seed ^ self.num_decisions.wrapping_mul(0xD1B5_4A32_D192_ED03))
    }
}

impl Pick<'_> {
    /// The worker in a slot, where it may take the request.
    fn try_slot(&self, slot: u32) -> Option<(Found, usize, CostModel)> {
        let standing = self.scheduler.workers.standings().get(slot as usize)?;
        let mut chains = self.chains.iter();
        let number = chains.position(|chain| chain.group == standing.group)?;
        let chain = &self.chains[number];
        let needs = Scheduler::needs(self.request, chain, self.room);
        if !needs.allow(standing, 0) {
            // Blocks that it has cached need no room.
            let index = &self.scheduler.index;
            let depth = index.depth_of(&chain.blocks, standing.holder);
            if depth == 0 || !needs.allow(standing, depth) {
                return None;
            }
        }
        let costs = self.scheduler.cost_model(self.request, chain);
        let prompt = costs.prompt_tokens + self.scheduler.load_tokens(chain, slot);
        let cost = costs.cost(prompt, standing.queued, standing.batch.into());
        let found = Found {
            cost,
            last_chosen: standing.last_chosen,
            slot,
            depth: 0,
        };
        Some((found, number, costs))
    }

    /// The first after the last one, by slot, once around.
    fn next_in_turn(&self, model: &Model) -> Option<(Found, usize, CostModel)> {
        let num_slots = self.scheduler.workers.num_slots() as u32;
        let start = model.last_slot.map_or(0, |slot| slot + 1);
        let mut slots = (start..num_slots).chain(0..start.min(num_slots));
        slots.find_map(|slot| self.try_slot(slot))
    }

    /// The first on the ring, from the session's place on.
    fn of_session(&self, model: &Model) -> Option<(Found, usize, CostModel)> {
        let first_block = self.chains.first().and_then(|chain| chain.blocks.first());
        let key = match self.request.session_key {
            "" => first_block.map_or(0, |hash| hash.0),
            key => xxh3_64(key.as_bytes()),
        };
        model
            .ring
            .after_key(key)
            .find_map(|slot| self.try_slot(slot))
    }

    /// The less loaded of two.
    fn of_two(&self) -> Option<(Found, usize, CostModel)> {
        let mut random = self.scheduler.random();
        let first = self.any(&mut random)?;
        let is_other = |drawn: &(Found, usize, CostModel)| drawn.0.slot != first.0.slot;
        let mut draws = (0..4).filter_map(|_| self.any(&mut random));
        let second = draws.find(is_other);
        let second = second.filter(|second| second.0.cost < first.0.cost);
        Some(second.unwrap_or(first))
    }

    /// Any, all alike: drawn until one may take it, or from those that may where they are rare.
    fn any(&self, random: &mut Random) -> Option<(Found, usize, CostModel)> {
        let members = |chain: &Chain<'_>| &self.scheduler.groups.get(chain.group).members;
        let total: usize = self.chains.iter().map(|chain| members(chain).len()).sum();
        for _ in 0..NUM_DRAWS {
            let mut drawn = random.below(total)?;
            for chain in self.chains {
                if let Some(&slot) = members(chain).get(drawn) {
                    match self.try_slot(slot) {
                        Some(found) => return Some(found),
                        None => break,
                    }
                }
                drawn -= members(chain).len();
            }
        }
        let slots = self.chains.iter().flat_map(members);
        let mut allowed: Vec<_> = slots.filter_map(|&slot| self.try_slot(slot)).collect();
        let drawn = random.below(allowed.len())?;
        Some(allowed.swap_remove(drawn))
    }
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    /// A number below `bound`; `None` where there is none.
    fn below(&mut self, bound: usize) -> Option<usize> {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        let scaled = (u128::from(mixed) * bound as u128) >> 64;
        (bound > 0).then_some(scaled as usize)
    }
}
