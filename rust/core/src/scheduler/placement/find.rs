//! Chooses a gang: domain, GPUs, addresses.
//!
//! Domain: narrow gangs take the first that fits, seen from the low end. Wide ones take one whose `k`-th GPU has about
//! the least room that is enough, the first such from the high end. So between the two whole domains stay free, and
//! none is opened for a wide gang that fits into one in use. GPUs: the `k` with the least room that is enough. Address:
//! best fit, at the gang's end of the run.
//!
//! Complexity: O(D/64 + G) and the pieces on the chosen GPUs, for D domains of G GPUs; see [`super::eligible`]. What
//! asks for more than one number per GPU (weights beside KV, shares of a node) is counted domain by domain instead,
//! among those that the index does not rule out: O(D/64 + G) for each.

use std::ops::Range;

use super::{
    super::{
        error::SchedulerError,
        place::{GpuId, Layout, NUM_PRIORITIES, PlaceRequest, PlacementId, Shares},
    },
    GpuPool,
    eligible::{EligibleDomains, set_bits},
    memory::{End, GpuMemory, Run},
    registry::DOMAIN_GPUS_MAX,
};

/// Gangs of at least this many GPUs are wide: those that need all of an HGX board. With 4 instead, paged gangs in 8-GPU
/// domains were rejected a fifth more often (simulated, three seeds, 90 % load) and as often in 72-GPU domains. First
/// fit for wide gangs too rejected 3.9 instead of 2.3 % of paged and 9.3 instead of 7.8 % of contiguous demand (8-GPU
/// domains, median extent 12.5 % of a GPU); tightest domains for narrow gangs too rejected two to four times as much,
/// because they break up the boards that wide gangs need.
const WIDE_GANG_GPUS: usize = 8;

/// Stages of one pipeline.
const STAGES_MAX: u32 = 64;

/// A piece of one GPU of a gang.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pick {
    pub(super) id: GpuId,
    /// Its slot.
    pub(super) gpu: u32,
    pub(super) stage: u32,
    pub(super) offset: u32,
    pub(super) length: u32,
    pub(super) layout: Layout,
}

/// What a gang would take.
#[derive(Debug)]
pub(super) struct Gang {
    /// By stage, in it by GPU in order of registration, then by address.
    pub(super) picks: Vec<Pick>,
    /// Whom it displaces.
    pub(super) victims: Vec<PlacementId>,
}

/// A checked request in extents.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    /// GPUs of one stage.
    pub(super) num_gpus: usize,
    pub(super) num_stages: usize,
    /// Extents in one piece on each GPU; 0 for none.
    pub(super) run: u32,
    /// Extents on each GPU, those in one piece and the others.
    pub(super) total: u32,
    pub(super) shares: Shares,
    pub(super) end: End,
    pub(super) priority: u8,
}

/// What counts as room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counting {
    /// What is free or held at a lower priority than this; 0 counts what is free.
    Below(u8),
    /// All memory of all GPUs, also of those out of use.
    Everything,
}

impl Ask {
    /// Whether one number says if a GPU fits, so that the index alone can answer.
    pub(super) fn is_plain(&self) -> bool {
        (self.run == 0 || self.run == self.total) && self.shares.is_none()
    }

    pub(super) fn fits(&self, longest: u32, total: u32) -> bool {
        longest >= self.run && total >= self.total
    }
}

impl GpuPool {
    /// The gang that the request would get, or why it would get none.
    pub(super) fn choose(&self, request: &PlaceRequest) -> Result<Gang, SchedulerError> {
        let ask = self.ask(request)?;
        if let Some(gang) = self.free_gang(&ask) {
            return Ok(gang);
        }
        if ask.priority > 0
            && let Some(gang) = self.preempting_gang(&ask)
        {
            return Ok(gang);
        }
        Err(self.refusal(request, &ask))
    }

    fn ask(&self, request: &PlaceRequest) -> Result<Ask, SchedulerError> {
        let invalid = |field, expected| Err(SchedulerError::InvalidField { field, expected });
        if request.num_gpus == 0 {
            return invalid("num_gpus", "at least 1");
        }
        if request.bytes_per_gpu == 0 {
            return invalid("bytes_per_gpu", "at least 1");
        }
        if !(1..=STAGES_MAX).contains(&request.num_stages) {
            return invalid("num_stages", "1 to 64");
        }
        if usize::from(request.priority) >= NUM_PRIORITIES {
            return invalid("priority", "0 to 3");
        }
        // No GPU has 2^32 - 1 extents, free or not: what does not fit 32 bits fits nowhere.
        let units =
            |bytes: u64| u32::try_from(bytes.div_ceil(self.extent_bytes)).unwrap_or(u32::MAX);
        let first = units(request.bytes_per_gpu);
        let (num_gpus, num_stages) = (request.num_gpus as usize, request.num_stages as usize);
        Ok(Ask {
            num_gpus,
            num_stages,
            run: match request.layout {
                Layout::Contiguous => first,
                Layout::Paged => 0,
            },
            total: first.saturating_add(units(request.paged_bytes_per_gpu)),
            shares: request.shares_per_gpu,
            end: if num_gpus.saturating_mul(num_stages) >= WIDE_GANG_GPUS {
                End::High
            } else {
                End::Low
            },
            priority: request.priority,
        })
    }

    /// The gang that free memory has room for.
    fn free_gang(&self, ask: &Ask) -> Option<Gang> {
        let width = ask.num_gpus.saturating_mul(ask.num_stages);
        let mut picks = Vec::with_capacity(ask.num_gpus.min(DOMAIN_GPUS_MAX));
        if let Some(domain) = self.domain_for(ask, width) {
            self.pick_stages(domain, 0..ask.num_stages, ask, &mut picks);
        } else if ask.num_stages > 1 {
            let mut stage = 0;
            for (domain, num_stages) in self.spread(ask)? {
                self.pick_stages(domain, stage..stage + num_stages, ask, &mut picks);
                stage += num_stages;
            }
        } else {
            return None;
        }
        Some(Gang {
            picks,
            victims: Vec::new(),
        })
    }

    /// The domain for `width` GPUs. Where the index alone cannot answer it is the first one, seen from the gang's end.
    fn domain_for(&self, ask: &Ask, width: usize) -> Option<u32> {
        if ask.is_plain() {
            let index = self.index(ask, Counting::Below(0));
            return index.domain(width, ask.total, ask.end, &self.classes);
        }
        let mut candidates = self.candidates(ask, width, Counting::Below(0));
        candidates.find(|&domain| self.num_usable(domain, ask, Counting::Below(0)) >= width)
    }

    /// The index that knows one number of the request: its run where it wants one, else its total.
    pub(super) fn index(&self, ask: &Ask, counting: Counting) -> &EligibleDomains {
        match counting {
            Counting::Below(priority) if ask.run > 0 => &self.by_run[usize::from(priority)],
            Counting::Below(priority) => &self.by_total[usize::from(priority)],
            Counting::Everything => &self.by_capacity,
        }
    }

    /// The index of the other number.
    fn index_of_total(&self, counting: Counting) -> &EligibleDomains {
        match counting {
            Counting::Below(priority) => &self.by_total[usize::from(priority)],
            Counting::Everything => &self.by_capacity,
        }
    }

    /// The domains where `num_gpus` GPUs may fit, from the gang's end: none that fits is missing.
    pub(super) fn candidates(
        &self,
        ask: &Ask,
        num_gpus: usize,
        counting: Counting,
    ) -> impl Iterator<Item = u32> + '_ {
        let totals = self.index_of_total(counting);
        let totals = totals.candidates(num_gpus, ask.total, &self.classes);
        let runs = match ask.run {
            0 => totals,
            run => self
                .index(ask, counting)
                .candidates(num_gpus, run, &self.classes),
        };
        set_bits(runs, totals, ask.end)
    }

    /// Longest run and total of each GPU of the domain.
    pub(super) fn rooms(
        &self,
        domain: u32,
        counting: Counting,
    ) -> impl Iterator<Item = (u32, u32)> + '_ {
        let (runs, totals) = match counting {
            Counting::Below(priority) => {
                let priority = usize::from(priority);
                (&self.by_run[priority], &self.by_total[priority])
            }
            Counting::Everything => (&self.by_capacity, &self.by_capacity),
        };
        let (runs, totals) = (runs.domain_rooms(domain), totals.domain_rooms(domain));
        runs.iter().copied().zip(totals.iter().copied())
    }

    /// How many GPUs of the domain could take part at once.
    pub(super) fn num_usable(&self, domain: u32, ask: &Ask, counting: Counting) -> usize {
        let rooms = self.rooms(domain, counting).enumerate();
        let fits = rooms.filter(|&(_, (longest, total))| ask.fits(longest, total));
        if ask.shares.is_none() {
            return fits.count();
        }
        let mut budget = self.budget(domain, &ask.shares, counting);
        fits.filter(|&(member, _)| budget.take(self, self.member_slot(domain, member)))
            .count()
    }

    pub(super) fn member_slot(&self, domain: u32, member: usize) -> u32 {
        self.member_slots[domain as usize * self.index_shape.num_slots + member]
    }

    /// Picks the GPUs of some stages in a domain where they fit.
    fn pick_stages(&self, domain: u32, stages: Range<usize>, ask: &Ask, picks: &mut Vec<Pick>) {
        let num = ask.num_gpus * stages.len();
        let from = picks.len();
        self.pick_members(domain, num, ask, picks);
        let picks = &mut picks[from..];
        picks.sort_unstable_by_key(|pick| (pick.id, pick.offset));
        if ask.num_stages > 1 {
            // Neighbours in order of registration share a stage.
            let (mut num_gpus, mut last) = (0, None);
            for pick in picks {
                num_gpus += usize::from(last != Some(pick.gpu));
                last = Some(pick.gpu);
                pick.stage = (stages.start + (num_gpus - 1) / ask.num_gpus) as u32;
            }
        }
    }

    /// Picks the `num` members with the least room that is enough; ties by address as seen from the end.
    fn pick_members(&self, domain: u32, num: usize, ask: &Ask, picks: &mut Vec<Pick>) {
        let rooms = self.index(ask, Counting::Below(0)).domain_rooms(domain);
        let rank = |member: usize| match ask.end {
            End::Low => member,
            End::High => rooms.len() - 1 - member,
        };
        let fits = rooms.iter().enumerate();
        if ask.is_plain() && num == 1 {
            let fits = fits.filter(|&(_, &room)| room >= ask.total);
            if let Some((_, nearest)) = fits.map(|(member, &room)| (room, rank(member))).min() {
                self.pick(self.member_slot(domain, rank(nearest)), ask, picks);
            }
            return;
        }
        let totals = self.index_of_total(Counting::Below(0)).domain_rooms(domain);
        let fits = fits
            .zip(totals)
            .filter(|&((_, &room), &total)| total >= ask.total && room >= ask.run);
        let fits = fits.map(|((member, &room), _)| (room, rank(member) as u8));
        let mut buffer = [(0, 0); DOMAIN_GPUS_MAX];
        let mut num_fits = 0;
        for (cell, fit) in buffer.iter_mut().zip(fits) {
            *cell = fit;
            num_fits += 1;
        }
        let fits = &mut buffer[..num_fits];
        let slot = |&(_, nearest): &(u32, u8)| self.member_slot(domain, rank(usize::from(nearest)));
        if ask.shares.is_none() {
            if num < num_fits {
                fits.select_nth_unstable(num);
            }
            for fit in fits.iter().take(num) {
                self.pick(slot(fit), ask, picks);
            }
            return;
        }
        fits.sort_unstable();
        let mut budget = self.budget(domain, &ask.shares, Counting::Below(0));
        let allowed = fits.iter().map(slot);
        let allowed = allowed.filter(|&slot| budget.take(self, slot));
        for slot in allowed.take(num) {
            self.pick(slot, ask, picks);
        }
    }

    /// Adds the pieces that the request takes of a GPU.
    fn pick(&self, slot: u32, ask: &Ask, picks: &mut Vec<Pick>) {
        let Some(gpu) = self.gpus[slot as usize].as_ref() else {
            debug_assert!(false, "the index names a GPU that is gone");
            return;
        };
        let run = match ask.run {
            0 => None,
            length => gpu
                .memory
                .best_offset(length, ask.end)
                .map(|offset| Run { offset, length }),
        };
        self.pick_pieces(slot, &gpu.memory, run, ask, picks);
    }

    /// Adds a GPU's run and the pages beside it, of memory where both are free.
    pub(super) fn pick_pieces(
        &self,
        slot: u32,
        memory: &GpuMemory,
        run: Option<Run>,
        ask: &Ask,
        picks: &mut Vec<Pick>,
    ) {
        let Some(id) = self.gpus[slot as usize].as_ref().map(|gpu| gpu.id) else {
            return;
        };
        let pick = |run: Run, layout| Pick {
            id,
            gpu: slot,
            stage: 0,
            offset: run.offset,
            length: run.length,
            layout,
        };
        picks.extend(run.map(|run| pick(run, Layout::Contiguous)));
        if ask.total > ask.run {
            let mut pages = Vec::new();
            memory.pages(ask.total - ask.run, run, ask.end, &mut pages);
            picks.extend(pages.into_iter().map(|run| pick(run, Layout::Paged)));
        }
    }
}
