//! More workers than one scheduler takes: several schedulers, and one decision over all of them.
//!
//! A *cell* is a scheduler with its own index, up to 16,384 workers, typically those of one region or model pool. A
//! request's bound in a cell is what it would cost on a worker that has the deepest prefix found there, the least
//! queued and the smallest batch: no worker of the cell is cheaper. Cells are searched in order of their bounds, and
//! those whose bound is no better than what was found are not searched at all, so the choice is exact over all cells.
//!
//! Only for policies that go by cost. KV is fetched within a cell, so costs are those of the cell; and a worker of role
//! `prefill` takes whole requests where its own cell has no other. Cost of a decision: a depth search for each cell, and a routing decision for each that is searched, mostly one.

use std::cmp::Reverse;

use super::{
    Scheduler, SchedulerConfig, SchedulerError,
    index::Probed,
    reservation::Reservation,
    route::{Candidate, RouteRequest},
};
use crate::{config::ConfigIssue, time::Time};

/// Cells of one [`Cells`], at most: more than two million workers.
const NUM_CELLS_MAX: usize = 128;

/// Names a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CellId(usize);

/// Several schedulers that decide as one.
#[derive(Debug)]
pub struct Cells {
    cells: Vec<Scheduler>,
}

impl Cells {
    /// So many cells without workers, 1 to 128, each with this configuration.
    pub fn new(config: &SchedulerConfig, num_cells: usize) -> Result<Self, Vec<ConfigIssue>> {
        if !(1..=NUM_CELLS_MAX).contains(&num_cells) {
            let message = format!("must be 1 to {NUM_CELLS_MAX}, got {num_cells}");
            return Err(vec![ConfigIssue::new("num_cells", message)]);
        }
        if !config.policy.is_least_cost() {
            let message = "cells need a policy that goes by cost";
            return Err(vec![ConfigIssue::new("policy", message)]);
        }
        let cells = (0..num_cells).map(|_| Scheduler::new(config.clone()));
        Ok(Self {
            cells: cells.collect::<Result<_, _>>()?,
        })
    }

    /// The cells' names.
    pub fn ids(&self) -> impl Iterator<Item = CellId> + use<> {
        (0..self.cells.len()).map(CellId)
    }

    /// One cell; `None` for the name of another [`Cells`].
    pub fn cell(&self, id: CellId) -> Option<&Scheduler> {
        self.cells.get(id.0)
    }

    /// One cell, to register workers in, to report to, and to give reservations back to.
    pub fn cell_mut(&mut self, id: CellId) -> Option<&mut Scheduler> {
        self.cells.get_mut(id.0)
    }

    /// Places the request on the best worker of all cells, whether or not that has room now, and reserves for it.
    ///
    /// On refusal nothing changes; the error is that of the cell that came closest to taking it.
    pub fn route(
        &mut self,
        request: &RouteRequest<'_>,
        now: Time,
    ) -> Result<(CellId, Reservation), SchedulerError> {
        let (id, chosen) = self.choose(request)?;
        let reservation = self.cells[id.0].reserve(request, chosen, now)?;
        Ok((id, reservation))
    }

    fn choose(&self, request: &RouteRequest<'_>) -> Result<(CellId, Candidate), SchedulerError> {
        request.validate()?;
        // Cells with the same weights hash alike, so the prompt is hashed once for all of them.
        let first = self.cells.iter().find_map(|cell| {
            let model = cell.groups.model(request.model)?;
            cell.chains(model, request).into_iter().next()
        });
        let request = &RouteRequest {
            hashed: request.hashed.or_else(|| Some(first.as_ref()?.hashed())),
            ..*request
        };
        let mut bounds = Vec::with_capacity(self.cells.len());
        for (index, cell) in self.cells.iter().enumerate() {
            bounds.extend(cell.least_cost_bound(request).map(|bound| (bound, index)));
        }
        bounds.sort_unstable();
        let mut best: Option<(usize, Candidate)> = None;
        for (bound, index) in bounds {
            // A worker that has room is better than any that has none, so a bound closes nothing before one is found.
            if best.is_some_and(|(_, best)| best.has_room && bound >= best.cost) {
                break;
            }
            let Ok(found) = self.cells[index].choose(request) else {
                continue;
            };
            let rank = |candidate: &Candidate| (Reverse(candidate.has_room), candidate.cost);
            if best.is_none_or(|(_, best)| rank(&found) < rank(&best)) {
                best = Some((index, found));
            }
        }
        match best {
            Some((index, found)) => Ok((CellId(index), found)),
            None => Err(self.refusal(request)),
        }
    }

    /// Why no cell takes the request.
    fn refusal(&self, request: &RouteRequest<'_>) -> SchedulerError {
        let errors = self.cells.iter().map(|cell| cell.choose(request).err());
        let closeness = |error: &SchedulerError| match error {
            SchedulerError::KvTooLarge { limit, .. } => (4, *limit),
            SchedulerError::ContextTooLong { limit, .. } => (3, *limit),
            SchedulerError::NoWorkers { registered } => (2, (*registered).into()),
            SchedulerError::NotServed { .. } => (1, 0),
            _ => (0, 0),
        };
        let closest = errors.flatten().max_by_key(closeness);
        closest.unwrap_or(SchedulerError::ModelNotFound)
    }
}

impl Scheduler {
    /// No worker here would take the request for less; `None` where none takes any now.
    fn least_cost_bound(&self, request: &RouteRequest<'_>) -> Option<u64> {
        let model = self.groups.model(request.model)?;
        let chains = self.chains(model, request);
        let bounds = chains.iter().filter_map(|chain| {
            let (queued, batch) = self.groups.get(chain.group).grid.least()?;
            let costs = self.cost_model(request, chain);
            let depth = if self.config.policy.uses_prefix() {
                let mut probed = Probed::new(&self.index, &chain.blocks);
                probed.deepest_above(chain.blocks.len(), 0).0 as u64
            } else {
                0
            };
            Some(costs.cost(costs.prefill(depth), queued, batch))
        });
        bounds.min()
    }
}
