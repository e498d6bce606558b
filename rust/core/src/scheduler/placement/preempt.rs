//! Chooses whom a gang displaces: placements of lower priority, the least work to replay.
//!
//! A request of priority `p` fits a domain where `k` GPUs have room once everything below `p` is gone; the index of
//! priority `p` knows these domains, so a request is refused only where no set of victims would help. In each such
//! domain every GPU names its cheapest window, the `k` cheapest GPUs make the gang, and the domain whose distinct
//! victims cost least wins. That is the optimum for one GPU with a contiguous extent; for gangs it counts a victim
//! that spans several of the GPUs once in the total but does not search for such overlaps. A pipeline takes the
//! cheapest stages of all domains, and then brings those of one domain and of one rack together. Nothing is displaced
//! unless the whole gang fits. Victims make room in GPU memory only: what GPUs share has to be free.
//!
//! Complexity: O(domains that fit × G × pieces²); it runs only where free memory did not suffice.

use super::{
    super::place::PlacementId,
    Gang, GpuPool,
    find::{Ask, Counting},
    memory::{GpuMemory, Piece, Run},
};

/// What it would take to make room on one GPU.
#[derive(Debug)]
struct Window {
    cost: u64,
    slot: u32,
    /// Where the contiguous part goes.
    run: Option<Run>,
    victims: Vec<PlacementId>,
}

impl GpuPool {
    /// The gang whose victims have the least to replay. `None` where no victims make room.
    pub(super) fn preempting_gang(&self, ask: &Ask) -> Option<Gang> {
        let stages = if ask.num_stages == 1 {
            vec![self.cheapest_stage(ask)?]
        } else {
            self.cheapest_stages(ask)?
        };
        let victims = distinct(stages.iter().flatten());
        let mut gang = Gang {
            picks: Vec::with_capacity(ask.num_gpus),
            victims,
        };
        for (stage, windows) in stages.iter().enumerate() {
            let from = gang.picks.len();
            for window in windows {
                self.pick_window(window, ask, &mut gang);
            }
            let picks = &mut gang.picks[from..];
            picks.sort_unstable_by_key(|pick| (pick.id, pick.offset));
            for pick in picks {
                pick.stage = stage as u32;
            }
        }
        Some(gang)
    }

    /// Adds what the gang takes of a GPU once its victims are gone.
    fn pick_window(&self, window: &Window, ask: &Ask, gang: &mut Gang) {
        let Some(memory) = self.memory(window.slot) else {
            return;
        };
        let mut memory = memory.clone();
        for &victim in &gang.victims {
            memory.remove(victim);
        }
        self.pick_pieces(window.slot, &memory, window.run, ask, &mut gang.picks);
    }

    /// The windows of the domain whose distinct victims cost least.
    fn cheapest_stage(&self, ask: &Ask) -> Option<Vec<Window>> {
        let below = Counting::Below(ask.priority);
        let domains = self.candidates(ask, ask.num_gpus, below);
        let offers = domains.filter_map(|domain| {
            let mut windows = self.windows(domain, ask);
            windows.truncate(ask.num_gpus);
            if windows.len() < ask.num_gpus {
                return None;
            }
            let victims = distinct(&windows);
            Some((self.cost(&victims), victims.len(), domain, windows))
        });
        let best = offers.min_by_key(|&(cost, num_victims, domain, _)| (cost, num_victims, domain));
        best.map(|(_, _, _, windows)| windows)
    }

    /// The windows of the cheapest stages, neighbours next to each other.
    fn cheapest_stages(&self, ask: &Ask) -> Option<Vec<Vec<Window>>> {
        let below = Counting::Below(ask.priority);
        let mut offers = Vec::new();
        for domain in self.candidates(ask, ask.num_gpus, below) {
            let mut windows = self.windows(domain, ask).into_iter();
            loop {
                let stage: Vec<Window> = windows.by_ref().take(ask.num_gpus).collect();
                if stage.len() < ask.num_gpus {
                    break;
                }
                let cost = stage.iter().map(|window| window.cost);
                let cost = cost.fold(0, u64::saturating_add);
                offers.push((cost, self.rack(domain), domain, stage));
            }
        }
        offers.sort_by_key(|&(cost, rack, domain, _)| (cost, rack, domain));
        offers.truncate(ask.num_stages);
        if offers.len() < ask.num_stages {
            return None;
        }
        offers.sort_by_key(|&(_, rack, domain, _)| (rack, domain));
        Some(offers.into_iter().map(|(_, _, _, stage)| stage).collect())
    }

    /// Windows of the GPUs that could take part at once, the cheapest first.
    fn windows(&self, domain: u32, ask: &Ask) -> Vec<Window> {
        let rooms = self
            .rooms(domain, Counting::Below(ask.priority))
            .enumerate();
        let fits = rooms.filter(|&(_, (longest, total))| ask.fits(longest, total));
        let windows =
            fits.filter_map(|(member, _)| self.window(self.member_slot(domain, member), ask));
        let mut windows: Vec<Window> = windows.collect();
        windows.sort_by_key(|window| (window.cost, window.victims.len()));
        let mut budget = self.budget(domain, &ask.shares, Counting::Below(0));
        windows.retain(|window| ask.shares.is_none() || budget.take(self, window.slot));
        windows
    }

    fn window(&self, slot: u32, ask: &Ask) -> Option<Window> {
        let memory = self.memory(slot)?;
        let (run, mut victims) = if ask.run > 0 {
            let (run, victims) = self.cheapest_run(memory, ask)?;
            (Some(run), victims)
        } else {
            (None, Vec::new())
        };
        if ask.total > ask.run {
            self.add_cheapest_pages(memory, ask, &mut victims)?;
        }
        Some(Window {
            cost: self.cost(&victims),
            slot,
            run,
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
            let length = ask.run;
            let stop = offset.checked_add(length)?;
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
            Some((Run { offset, length }, victims))
        };
        starts
            .filter_map(window)
            .min_by_key(|(run, victims)| (self.cost(victims), victims.len(), run.offset))
    }

    /// Adds victims until their pieces and the free memory are enough: the cheapest per extent first, the needless
    /// left out. `None` where all of them are not enough.
    fn add_cheapest_pages(
        &self,
        memory: &GpuMemory,
        ask: &Ask,
        victims: &mut Vec<PlacementId>,
    ) -> Option<()> {
        let mut gained: u32 = memory.free_runs().map(|run| run.length).sum();
        let mut candidates: Vec<(PlacementId, u32, u64)> = Vec::new();
        for piece in memory.pieces().filter(|p| p.priority < ask.priority) {
            let mut known = candidates.iter_mut();
            if victims.contains(&piece.placement) {
                gained += piece.length;
            } else if let Some(candidate) = known.find(|c| c.0 == piece.placement) {
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
        let mut taken = Vec::new();
        for candidate in candidates {
            if gained >= ask.total {
                break;
            }
            gained += candidate.1;
            taken.push(candidate);
        }
        if gained < ask.total {
            return None;
        }
        // The dearest first: whoever is not needed stays.
        taken.sort_by_key(|&(id, _, cost)| (u64::MAX - cost, id));
        taken.retain(|&(_, length, _)| {
            let is_needed = gained - length < ask.total;
            if !is_needed {
                gained -= length;
            }
            is_needed
        });
        victims.extend(taken.into_iter().map(|(id, _, _)| id));
        Some(())
    }

    fn cost(&self, victims: &[PlacementId]) -> u64 {
        let costs = victims.iter().filter_map(|victim| self.held.get(victim));
        costs.fold(0, |sum, held| sum.saturating_add(held.replay_cost))
    }
}

fn distinct<'a>(windows: impl IntoIterator<Item = &'a Window>) -> Vec<PlacementId> {
    let windows = windows.into_iter();
    let victims = windows.flat_map(|window| window.victims.iter().copied());
    let mut victims: Vec<PlacementId> = victims.collect();
    victims.sort_unstable();
    victims.dedup();
    victims
}
