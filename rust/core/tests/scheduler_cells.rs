//! Several cells against one scheduler that has all their workers: every decision costs the same.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use orchestra_core::{
    Time, block_hashes,
    scheduler::{
        CellId, Cells, ReservationId, RoutePolicy, RouteRequest, Scheduler, SchedulerConfig,
        SchedulerError, WorkerId, WorkerSpec,
    },
    step::KvEvent,
};
use proptest::prelude::*;

const BLOCK_SIZE: u32 = 4;
const POLICIES: [RoutePolicy; 5] = [
    RoutePolicy::Product,
    RoutePolicy::PrefixSum,
    RoutePolicy::LoadOnly,
    RoutePolicy::LeastRequests,
    RoutePolicy::LeastTokens,
];

fn prompt(family: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|at| family * 1000 + at).collect()
}

fn request(token_ids: &[u32]) -> RouteRequest<'_> {
    RouteRequest {
        model: "model",
        token_ids,
        max_tokens: 4,
        ..RouteRequest::default()
    }
}

fn config(policy: RoutePolicy) -> SchedulerConfig {
    SchedulerConfig {
        policy,
        seq_cost_tokens: 3,
        ..SchedulerConfig::default()
    }
}

/// The same workers in cells and in one scheduler.
struct Pair {
    cells: Cells,
    all: Scheduler,
    /// Each worker's cell, its id there, and its id among all.
    workers: Vec<(CellId, WorkerId, WorkerId)>,
    held: Vec<(CellId, ReservationId, ReservationId)>,
}

impl Pair {
    fn new(policy: RoutePolicy, sizes: &[(usize, u32, u32)]) -> Self {
        let mut cells = Cells::new(&config(policy), 4).unwrap();
        let mut all = Scheduler::new(config(policy)).unwrap();
        let ids: Vec<CellId> = cells.ids().collect();
        let mut workers = Vec::new();
        for (index, &(cell, num_blocks, max_num_seqs)) in sizes.iter().enumerate() {
            let spec = WorkerSpec {
                name: format!("worker-{index}"),
                model: "model".to_owned(),
                block_size: BLOCK_SIZE,
                num_blocks,
                max_num_seqs,
                max_model_len: 1000,
                ..WorkerSpec::default()
            };
            let id = ids[cell];
            let in_cell = cells
                .cell_mut(id)
                .unwrap()
                .add_worker(spec.clone())
                .unwrap();
            workers.push((id, in_cell, all.add_worker(spec).unwrap()));
        }
        Self {
            cells,
            all,
            workers,
            held: Vec::new(),
        }
    }

    fn stored(&mut self, pick: usize, family: u32, blocks: usize) {
        let (cell, in_cell, among_all) = self.workers[pick % self.workers.len()];
        let spec = self.all.worker_spec(among_all).unwrap();
        let chain = block_hashes(
            spec.hash_seed("", None),
            &prompt(family, 40),
            BLOCK_SIZE as usize,
        );
        let event = KvEvent::Stored(chain[..blocks.min(spec.num_blocks as usize)].to_vec());
        let cell = self.cells.cell_mut(cell).unwrap();
        let outcome = cell.apply_kv_event(in_cell, &event);
        assert_eq!(self.all.apply_kv_event(among_all, &event), outcome);
    }

    fn drain(&mut self, pick: usize, on: bool) {
        let (cell, in_cell, among_all) = self.workers[pick % self.workers.len()];
        self.cells.cell_mut(cell).unwrap().set_draining(in_cell, on);
        self.all.set_draining(among_all, on);
    }

    fn route(&mut self, family: u32, len: usize) {
        let token_ids = prompt(family, len);
        let request = request(&token_ids);
        let (cell, reservation) = match self.cells.route(&request, Time::ZERO) {
            Ok(routed) => routed,
            Err(error) => {
                let expected = self.all.route(&request, Time::ZERO).unwrap_err();
                assert_eq!(error.code(), expected.code());
                return;
            }
        };
        let explained = self.all.explain(&request, usize::MAX).unwrap().candidates;
        let chosen = |&&(id, worker, _): &&(CellId, WorkerId, WorkerId)| {
            (id, worker) == (cell, reservation.worker)
        };
        let among_all = self.workers.iter().find(chosen).unwrap().2;
        let candidate = explained.iter().find(|it| it.worker == among_all).unwrap();
        let best = explained.first().unwrap();
        assert_eq!(
            (candidate.has_room, candidate.cost),
            (best.has_room, best.cost)
        );
        assert_eq!(candidate.num_cached_tokens, reservation.num_cached_tokens);
        // The same worker there, so that both stay alike.
        let others: Vec<WorkerId> = self
            .workers
            .iter()
            .map(|&(_, _, id)| id)
            .filter(|&id| id != among_all)
            .collect();
        let alone = RouteRequest {
            exclude: &others,
            ..request
        };
        let twin = self.all.route(&alone, Time::ZERO).unwrap();
        self.held.push((cell, reservation.id, twin.id));
    }

    fn release(&mut self, pick: usize) {
        if let Some(index) = pick.checked_rem(self.held.len()) {
            let (cell, in_cell, among_all) = self.held.swap_remove(index);
            assert!(self.cells.cell_mut(cell).unwrap().release(in_cell));
            assert!(self.all.release(among_all));
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Stored(usize, u32, usize),
    Route(u32, usize),
    Release(usize),
    Drain(usize, bool),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_usize..50, 0_u32..3, 1_usize..10).prop_map(|(a, b, c)| Op::Stored(a, b, c)),
        6 => (0_u32..3, 1_usize..60).prop_map(|(family, len)| Op::Route(family, len)),
        3 => (0_usize..50).prop_map(Op::Release),
        1 => (0_usize..50, any::<bool>()).prop_map(|(worker, on)| Op::Drain(worker, on)),
    ]
}

proptest! {
    #[test]
    fn cells_decide_as_one_scheduler_would(
        policy in prop::sample::select(&POLICIES[..]),
        sizes in prop::collection::vec((0_usize..4, 10_u32..40, 1_u32..4), 1..12),
        ops in prop::collection::vec(op(), 1..80),
    ) {
        let mut pair = Pair::new(policy, &sizes);
        for op in ops {
            match op {
                Op::Stored(worker, family, blocks) => pair.stored(worker, family, blocks),
                Op::Route(family, len) => pair.route(family, len),
                Op::Release(pick) => pair.release(pick),
                Op::Drain(worker, on) => pair.drain(worker, on),
            }
        }
    }
}

#[test]
fn refusals_name_the_cell_that_came_closest() {
    let mut pair = Pair::new(RoutePolicy::Product, &[(0, 10, 1), (2, 20, 1)]);
    let token_ids = prompt(0, 200);
    let refused = pair.cells.route(&request(&token_ids), Time::ZERO);
    let expected = SchedulerError::KvTooLarge {
        requested: 51,
        limit: 20,
    };
    assert_eq!(refused, Err(expected));
    assert!(Cells::new(&config(RoutePolicy::Random), 2).is_err());
    assert!(Cells::new(&config(RoutePolicy::Product), 129).is_err());
}
