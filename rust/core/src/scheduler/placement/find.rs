//! Chooses a gang: domain, GPUs, addresses.
//!
//! Domain: narrow gangs take the first that fits, seen from the low end. Wide ones take one whose `k`-th GPU has about
//! the least room that is enough, the first such from the high end. So between the two whole domains stay free, and
//! none is opened for a wide gang that fits into one in use. GPUs: the `k` with the least room that is enough. Address:
//! best fit, at the gang's end of the run.
//!
//! Complexity: O(D/64 + G) and the pieces on the chosen GPUs, for D domains of G GPUs; see [`super::eligible`].

use super::{
    super::{
        error::SchedulerError,
        place::{GpuId, Layout, NUM_PRIORITIES, PlaceRequest, PlacementId},
    },
    GpuPool,
    eligible::EligibleDomains,
    memory::{End, Run},
    registry::DOMAIN_GPUS_MAX,
};

/// Gangs of at least this many GPUs are wide: those that need all of an HGX board. With 4 instead, paged gangs in 8-GPU
/// domains were rejected a fifth more often (simulated, three seeds, 90 % load) and as often in 72-GPU domains. First
/// fit for wide gangs too rejected 3.9 instead of 2.3 % of paged and 9.3 instead of 7.8 % of contiguous demand (8-GPU
/// domains, median extent 12.5 % of a GPU); tightest domains for narrow gangs too rejected two to four times as much,
/// because they break up the boards that wide gangs need.
const WIDE_GANG_GPUS: u32 = 8;

/// A piece of one GPU of a gang.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pick {
    pub(super) id: GpuId,
    /// Its slot.
    pub(super) gpu: u32,
    pub(super) offset: u32,
    pub(super) length: u32,
}

/// What a gang would take.
#[derive(Debug)]
pub(super) struct Gang {
    pub(super) domain: u32,
    pub(super) units: u32,
    /// By GPU in order of registration, then by address.
    pub(super) picks: Vec<Pick>,
    /// Whom it displaces.
    pub(super) victims: Vec<PlacementId>,
}

/// A checked request in extents.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) num_gpus: usize,
    pub(super) units: u32,
    pub(super) end: End,
    pub(super) layout: Layout,
    pub(super) priority: u8,
}

impl GpuPool {
    /// The gang that the request would get, or why it would get none.
    pub(super) fn choose(&self, request: &PlaceRequest) -> Result<Gang, SchedulerError> {
        let ask = self.ask(request)?;
        let index = self.index(ask.layout, 0);
        if let Some(domain) = index.domain(ask.num_gpus, ask.units, ask.end, &self.classes) {
            return Ok(self.gang_in(domain, &ask));
        }
        if ask.priority > 0
            && let Some(gang) = self.preempting_gang(&ask)
        {
            return Ok(gang);
        }
        Err(self.refusal(request, &ask))
    }

    fn ask(&self, request: &PlaceRequest) -> Result<Ask, SchedulerError> {
        for (field, value) in [
            ("num_gpus", request.num_gpus.into()),
            ("bytes_per_gpu", request.bytes_per_gpu),
        ] {
            if value == 0 {
                return Err(SchedulerError::InvalidField {
                    field,
                    expected: "at least 1",
                });
            }
        }
        if usize::from(request.priority) >= NUM_PRIORITIES {
            return Err(SchedulerError::InvalidField {
                field: "priority",
                expected: "0 to 3",
            });
        }
        let units = request.bytes_per_gpu.div_ceil(self.extent_bytes);
        Ok(Ask {
            num_gpus: request.num_gpus as usize,
            // No GPU has 2^32 - 1 extents free or not: what does not fit 32 bits fits nowhere.
            units: u32::try_from(units).unwrap_or(u32::MAX),
            end: if request.num_gpus >= WIDE_GANG_GPUS {
                End::High
            } else {
                End::Low
            },
            layout: request.layout,
            priority: request.priority,
        })
    }

    /// The index that says which domains fit a request of this layout and priority.
    pub(super) fn index(&self, layout: Layout, priority: u8) -> &EligibleDomains {
        match layout {
            Layout::Contiguous => &self.by_run[usize::from(priority)],
            Layout::Paged => &self.by_total[usize::from(priority)],
        }
    }

    /// The gang in a domain where it fits.
    fn gang_in(&self, domain: u32, ask: &Ask) -> Gang {
        let rooms = self.index(ask.layout, 0).domain_rooms(domain);
        let mut picks = Vec::with_capacity(ask.num_gpus);
        // The least room first, ties by address as seen from the end.
        let rank = |member: usize| match ask.end {
            End::Low => member,
            End::High => rooms.len() - 1 - member,
        };
        let fits = rooms.iter().enumerate();
        let fits = fits.filter(|&(_, &room)| room >= ask.units);
        let fits = fits.map(|(member, &room)| (room, rank(member) as u8));
        if ask.num_gpus == 1 {
            if let Some((_, nearest)) = fits.min() {
                self.pick(domain, rank(usize::from(nearest)), ask, &mut picks);
            }
        } else {
            let mut buffer = [(0, 0); DOMAIN_GPUS_MAX];
            let mut num_fits = 0;
            for (cell, fit) in buffer.iter_mut().zip(fits) {
                *cell = fit;
                num_fits += 1;
            }
            let fits = &mut buffer[..num_fits];
            if ask.num_gpus < num_fits {
                fits.select_nth_unstable(ask.num_gpus);
            }
            for &(_, nearest) in &fits[..ask.num_gpus] {
                self.pick(domain, rank(usize::from(nearest)), ask, &mut picks);
            }
        }
        picks.sort_unstable_by_key(|pick| (pick.id, pick.offset));
        Gang {
            domain,
            units: ask.units,
            picks,
            victims: Vec::new(),
        }
    }

    /// Adds the pieces that the request takes of a domain's member.
    fn pick(&self, domain: u32, member: usize, ask: &Ask, picks: &mut Vec<Pick>) {
        let slot = self.member_slots[domain as usize * self.index_shape.num_slots + member];
        let Some(gpu) = self.gpus[slot as usize].as_ref() else {
            debug_assert!(false, "the index names a GPU that is gone");
            return;
        };
        let mut add = |run: Run| {
            picks.push(Pick {
                id: gpu.id,
                gpu: slot,
                offset: run.offset,
                length: run.length,
            });
        };
        match ask.layout {
            Layout::Contiguous => {
                if let Some(offset) = gpu.memory.best_offset(ask.units, ask.end) {
                    let length = ask.units;
                    add(Run { offset, length });
                }
            }
            Layout::Paged => {
                let mut runs = Vec::new();
                gpu.memory.pages(ask.units, ask.end, &mut runs);
                runs.into_iter().for_each(add);
            }
        }
    }

    fn refusal(&self, request: &PlaceRequest, ask: &Ask) -> SchedulerError {
        let PlaceRequest {
            num_gpus,
            bytes_per_gpu,
            ..
        } = *request;
        let num_gpus_max = self.by_capacity.widest(ask.units, &self.classes);
        if num_gpus_max < num_gpus {
            return SchedulerError::GangTooLarge {
                num_gpus,
                bytes_per_gpu,
                num_gpus_max,
            };
        }
        let index = self.index(ask.layout, ask.priority);
        SchedulerError::NoGpuRoom {
            num_gpus,
            bytes_per_gpu,
            num_gpus_max: index.widest(ask.units, &self.classes),
        }
    }
}
