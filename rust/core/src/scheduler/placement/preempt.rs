//! Chooses whom a gang displaces: placements of lower priority, the least work to replay.
//!
//! A request of priority `p` fits a domain where `k` GPUs have room once everything below `p` is gone; the index of
//! priority `p` knows these domains, so a request is refused only where no set of victims would help. In each such
//! domain every GPU names its cheapest window, the `k` cheapest GPUs make the gang, and the domain whose distinct
//! victims cost least wins. That is the optimum for one GPU with a contiguous extent; for gangs it counts a victim
//! that spans several of the GPUs once in the total but does not search for such overlaps. Nothing is displaced
//! unless the whole gang fits.
//!
//! Complexity: O(domains that fit × G × pieces²); it runs only where free memory did not suffice.

use super::{
    super::place::{Layout, PlacementId},
    Gang, GpuPool,
    find::{Ask, Pick},
    memory::{End, GpuMemory, Piece, Run},
};

/// What it would take to make room on one GPU.
#[derive(Debug)]
struct Window {
    cost: u64,
    pick: Pick,
    victims: Vec<PlacementId>,
}

/// A domain's offer.
struct Offer {
    cost: u64,
    domain: u32,
    windows: Vec<Window>,
    victims: Vec<PlacementId>,
}

impl GpuPool {
    /// The gang whose victims have the least to replay. `None` where no victims make room.
    pub(super) fn preempting_gang(&self, ask: &Ask) -> Option<Gang> {
        let index = self.index(ask.layout, ask.priority);
        let domains = index.domains(ask.num_gpus, ask.units, &self.classes);
        let offers = domains.filter_map(|domain| self.offer(domain, ask));
        let best = offers.min_by_key(|offer| (offer.cost, offer.victims.len(), offer.domain))?;
        let mut picks = Vec::with_capacity(ask.num_gpus);
        for window in &best.windows {
            match ask.layout {
                Layout::Contiguous => picks.push(window.pick),
                Layout::Paged => self.pages_without(window.pick, &best.victims, &mut picks),
            }
        }
        picks.sort_unstable_by_key(|pick| (pick.id, pick.offset));
        Some(Gang {
            domain: best.domain,
            units: ask.units,
            picks,
            victims: best.victims,
        })
    }

    fn offer(&self, domain: u32, ask: &Ask) -> Option<Offer> {
        let members = &self.domains[domain as usize].as_ref()?.members;
        let rooms = self.index(ask.layout, ask.priority).domain_rooms(domain);
        let fits = members
            .iter()
            .zip(rooms)
            .filter(|&(_, &room)| room >= ask.units);
        let windows = fits.filter_map(|(&slot, _)| self.window(slot?, ask));
        let mut windows: Vec<Window> = windows.collect();
        windows.sort_by_key(|window| (window.cost, window.victims.len()));
        windows.truncate(ask.num_gpus);
        if windows.len() < ask.num_gpus {
            return None;
        }
        let victims = windows.iter().flat_map(|window| &window.victims).copied();
        let mut victims: Vec<PlacementId> = victims.collect();
        victims.sort_unstable();
        victims.dedup();
        Some(Offer {
            cost: self.cost(&victims),
            domain,
            windows,
            victims,
        })
    }

    fn window(&self, slot: u32, ask: &Ask) -> Option<Window> {
        let gpu = self.gpus[slot as usize].as_ref()?;
        let (run, victims) = match ask.layout {
            Layout::Contiguous => self.cheapest_run(&gpu.memory, ask)?,
            Layout::Paged => self.cheapest_pages(&gpu.memory, ask)?,
        };
        Some(Window {
            cost: self.cost(&victims),
            pick: Pick {
                id: gpu.id,
                gpu: slot,
                offset: run.offset,
                length: run.length,
            },
            victims,
        })
    }

    /// The contiguous window with the cheapest victims.
    ///
    /// Moving a window down until its start meets the end of a piece, or of its run, adds no victim; so only such
    /// starts are tried, and the cheapest of them is the optimum.
    fn cheapest_run(&self, memory: &GpuMemory, ask: &Ask) -> Option<(Run, Vec<PlacementId>)> {
        let ends = memory.pieces().map(|piece| piece.stop());
        let starts = ends.chain([0]);
        let window = |offset: u32| {
            let stop = offset.checked_add(ask.units)?;
            if stop > memory.capacity() {
                return None;
            }
            let inside = |piece: &Piece| piece.offset < stop && piece.stop() > offset;
            let pieces = memory.pieces().filter(inside);
            if pieces.clone().any(|piece| piece.priority >= ask.priority) {
                return None;
            }
            let mut victims: Vec<PlacementId> = pieces.map(|piece| piece.placement).collect();
            victims.sort_unstable();
            victims.dedup();
            let length = ask.units;
            Some((Run { offset, length }, victims))
        };
        starts
            .filter_map(window)
            .min_by_key(|(run, victims)| (self.cost(victims), victims.len(), run.offset))
    }

    /// Victims whose pieces and the free memory are enough: the cheapest per extent first, the needless left out.
    fn cheapest_pages(&self, memory: &GpuMemory, ask: &Ask) -> Option<(Run, Vec<PlacementId>)> {
        let free: u32 = memory.free_runs().map(|run| run.length).sum();
        let mut candidates: Vec<(PlacementId, u32, u64)> = Vec::new();
        for piece in memory.pieces().filter(|p| p.priority < ask.priority) {
            let mut known = candidates.iter_mut();
            if let Some(candidate) = known.find(|c| c.0 == piece.placement) {
                candidate.1 += piece.length;
            } else {
                let cost = self.cost(&[piece.placement]);
                candidates.push((piece.placement, piece.length, cost));
            }
        }
        candidates.sort_by(|a, b| {
            let (a_cost, b_cost) = (
                u128::from(a.2) * u128::from(b.1),
                u128::from(b.2) * u128::from(a.1),
            );
            a_cost.cmp(&b_cost).then(a.0.cmp(&b.0))
        });
        let mut gained = free;
        let mut taken = Vec::new();
        for candidate in candidates {
            if gained >= ask.units {
                break;
            }
            gained += candidate.1;
            taken.push(candidate);
        }
        if gained < ask.units {
            return None;
        }
        // The dearest first: whoever is not needed stays.
        taken.sort_by_key(|&(id, _, cost)| (u64::MAX - cost, id));
        taken.retain(|&(_, length, _)| {
            let is_needed = gained - length < ask.units;
            if !is_needed {
                gained -= length;
            }
            is_needed
        });
        let (offset, length) = (0, ask.units);
        let victims = taken.into_iter().map(|(id, _, _)| id).collect();
        Some((Run { offset, length }, victims))
    }

    /// The pieces that a paged gang takes of a GPU once the victims are gone.
    fn pages_without(&self, pick: Pick, victims: &[PlacementId], picks: &mut Vec<Pick>) {
        let Some(memory) = self.memory(pick.gpu) else {
            return;
        };
        let mut memory = memory.clone();
        for &victim in victims {
            memory.remove(victim);
        }
        let mut runs = Vec::new();
        memory.pages(pick.length, End::Low, &mut runs);
        picks.extend(runs.into_iter().map(|Run { offset, length }| Pick {
            offset,
            length,
            ..pick
        }));
    }

    fn cost(&self, victims: &[PlacementId]) -> u64 {
        let costs = victims.iter().filter_map(|victim| self.held.get(victim));
        costs.fold(0, |sum, held| sum.saturating_add(held.replay_cost))
    }
}
