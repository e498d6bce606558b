//! Who is next among those that wait for a worker: the order against a naive model, its bounds against adversaries, and
//! what a person would try first.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod bounds;
mod cases;
mod deadlines;
mod model;
mod preemption;
mod script;
mod seats;

use model::{Limits, Model, Waiter};
use orchestra_core::{
    ErrorCode, Time,
    scheduler::{
        AdmissionClass, Grant, Granted, Reservation, ReservationId, RouteRequest, Scheduler,
        SchedulerConfig, SchedulerError, TicketId, Wait, WorkerId, WorkerSpec,
    },
};
use proptest::prelude::*;

/// Tokens of a block on all workers.
const BLOCK_SIZE: u32 = 16;
/// Parts of a token that a charge of a tenant of weight 100 counts in.
const PARTS: u64 = 10_000;

fn add_worker(
    scheduler: &mut Scheduler,
    name: &str,
    max_num_seqs: u32,
    num_blocks: u32,
) -> WorkerId {
    let spec = WorkerSpec {
        name: name.to_owned(),
        model: "m".to_owned(),
        block_size: BLOCK_SIZE,
        num_blocks,
        max_num_seqs,
        max_model_len: 1 << 20,
        ..WorkerSpec::default()
    };
    scheduler.add_worker(spec).unwrap()
}

/// A scheduler with one worker that runs one request at a time.
fn counter(config: SchedulerConfig) -> Scheduler {
    let mut scheduler = Scheduler::new(config).unwrap();
    add_worker(&mut scheduler, "w", 1, 100_000);
    scheduler
}

fn request<'a>(tenant: &'a str, token_ids: &'a [u32], max_tokens: u32) -> RouteRequest<'a> {
    RouteRequest {
        model: "m",
        token_ids,
        max_tokens,
        tenant,
        ..RouteRequest::default()
    }
}

fn waits(scheduler: &mut Scheduler, request: &RouteRequest<'_>) -> TicketId {
    match scheduler.acquire(request, Time::ZERO).unwrap() {
        Wait::Waiting(ticket) => ticket,
        Wait::Granted(reservation) => panic!("there was room: {reservation:?}"),
    }
}

fn granted(scheduler: &mut Scheduler, request: &RouteRequest<'_>) -> ReservationId {
    match scheduler.acquire(request, Time::ZERO).unwrap() {
        Wait::Granted(reservation) => reservation.id,
        Wait::Waiting(ticket) => panic!("there was no room: {ticket:?}"),
    }
}

fn reservation(grant: Grant) -> (TicketId, Reservation) {
    match grant.outcome {
        Ok(Granted::Reservation(reservation)) => (grant.ticket, reservation),
        other => panic!("not a reservation: {other:?}"),
    }
}

fn take(scheduler: &mut Scheduler) -> Vec<(TicketId, Reservation)> {
    let grants = scheduler.take_grants(Time::ZERO);
    grants.into_iter().map(reservation).collect()
}

/// Gives the counter back and says who is served next.
fn next(scheduler: &mut Scheduler, held: &mut ReservationId) -> Option<TicketId> {
    assert!(scheduler.release(*held));
    let grants = take(scheduler);
    assert!(grants.len() <= 1, "one at a time");
    let (ticket, reservation) = *grants.first()?;
    *held = reservation.id;
    Some(ticket)
}

#[derive(Clone, Debug)]
enum Op {
    Acquire {
        tenant: usize,
        class: AdmissionClass,
        prefix: u32,
        length: usize,
        max_tokens: u32,
        deadline: Option<u64>,
    },
    /// The running request ends, after this part of its output or without saying how much that was.
    End(Option<u32>),
    Cancel(usize),
    Wait(u64),
    Weigh(usize, u32),
}

fn op() -> impl Strategy<Value = Op> {
    let class = prop::sample::select(AdmissionClass::ALL.to_vec());
    let length = prop_oneof![Just(1_usize), Just(16), Just(257), Just(900), Just(3_000)];
    let acquire = (
        0_usize..4,
        class,
        0_u32..3,
        length,
        1_u32..500,
        prop::option::weighted(0.2, 0_u64..40),
    );
    prop_oneof![
        6 => acquire.prop_map(|(tenant, class, prefix, length, max_tokens, deadline)| {
            Op::Acquire { tenant, class, prefix, length, max_tokens, deadline }
        }),
        4 => prop::option::of(0_u32..600).prop_map(Op::End),
        1 => (0_usize..100).prop_map(Op::Cancel),
        1 => (0_u64..10).prop_map(Op::Wait),
        1 => (0_usize..4, prop::sample::select(vec![50_u32, 100, 200]))
            .prop_map(|(tenant, weight)| Op::Weigh(tenant, weight)),
    ]
}

/// The scheduler and its model, side by side.
struct Pair {
    real: Scheduler,
    model: Model,
    now: Time,
    weights: [u64; 4],
    max_num_waiting: usize,
    /// What runs: whose, and what of its charge is for output.
    held: Option<(ReservationId, (AdmissionClass, usize), u64, u32)>,
    /// Who lost their place in a full queue and were not told yet.
    displaced: Vec<TicketId>,
    /// Of waiting requests: what of their charge is for an output token, and how many these are.
    outputs: Vec<(TicketId, u64, u32)>,
}

impl Pair {
    fn new(limits: Limits, max_num_waiting: u32) -> Self {
        let [interactive_weight, standard_weight, batch_weight] =
            limits.class_weights.map(|weight| weight as u32);
        let config = SchedulerConfig {
            max_num_waiting,
            max_overtakes: limits.max_overtakes as u32,
            max_tenant_overtakes: limits.max_tenant_overtakes as u32,
            interactive_weight,
            standard_weight,
            batch_weight,
            input_token_weight: 3,
            output_token_weight: 5,
            ..SchedulerConfig::default()
        };
        Self {
            real: counter(config),
            model: Model::new(limits),
            now: Time::ZERO,
            weights: [100; 4],
            held: None,
            max_num_waiting: max_num_waiting as usize,
            displaced: Vec::new(),
            outputs: Vec::new(),
        }
    }

    fn acquire(
        &mut self,
        (tenant, class): (usize, AdmissionClass),
        prompt: &[u32],
        max_tokens: u32,
        deadline: Option<Time>,
    ) {
        let name = format!("t{tenant}");
        let request = RouteRequest {
            class,
            deadline,
            ..request(&name, prompt, max_tokens)
        };
        let parts = 1_000_000 / self.weights[tenant];
        let prefill = prompt.len() as u64;
        let charge = parts * (3 * prefill + 5 * u64::from(max_tokens));
        let answer = self.real.acquire(&request, self.now);
        if deadline.is_some_and(|deadline| deadline <= self.now) {
            assert_eq!(answer, Err(SchedulerError::DeadlineExceeded));
            return;
        }
        let per_output = 5 * parts;
        if self.held.is_some() && self.model.waiting.len() >= self.max_num_waiting {
            let lower = self.model.waiting.iter().filter(|it| it.class > class);
            let lowest = lower.max_by_key(|it| (it.class, it.ticket));
            let Some(ticket) = lowest.map(|it| it.ticket) else {
                let code = answer.map_err(|error| error.code());
                assert_eq!(code, Err(ErrorCode::QueueFull));
                return;
            };
            self.model.remove(ticket);
            self.displaced.push(ticket);
        }
        match answer.unwrap() {
            Wait::Granted(reservation) => {
                assert!(self.held.is_none() && self.model.waiting.is_empty());
                self.model.serve_unqueued(tenant, class, charge);
                self.held = Some((reservation.id, (class, tenant), per_output, max_tokens));
            }
            Wait::Waiting(ticket) => {
                assert!(self.held.is_some(), "nothing ran");
                let family = (prompt.len() >= BLOCK_SIZE as usize).then_some(prompt[0]);
                let who = (tenant, class);
                self.model
                    .push(ticket, who, (prefill, charge), family, deadline);
                // A charge is what weights were when the turn came.
                self.outputs.push((ticket, 3 * prefill, max_tokens));
            }
        }
    }

    fn end(&mut self, num_output_tokens: Option<u32>) {
        let Some((id, (class, tenant), per_output, max_tokens)) = self.held.take() else {
            return;
        };
        match num_output_tokens {
            Some(count) => {
                assert!(self.real.finish(id, count));
                let unused = u64::from(max_tokens.saturating_sub(count));
                self.model.refund((class, tenant), per_output * unused);
            }
            None => assert!(self.real.release(id)),
        }
    }

    /// Takes grants and holds them against the model's.
    fn settle(&mut self) {
        for ticket in self.displaced.drain(..) {
            let mut told = self.real.take_grants(self.now);
            assert_eq!(told.len(), 1, "one newcomer displaces one");
            let told = told.remove(0);
            assert_eq!(told.ticket, ticket, "another one was displaced");
            assert!(matches!(
                told.outcome,
                Err(SchedulerError::Displaced { .. })
            ));
        }
        let mut expected = Vec::new();
        let late = |waiter: &&Waiter| waiter.deadline.is_some_and(|it| it <= self.now);
        let late = self.model.waiting.iter().filter(late);
        let mut late: Vec<_> = late.map(|it| (it.deadline, it.ticket)).collect();
        late.sort_unstable();
        for (_, ticket) in late {
            self.model.remove(ticket);
            expected.push((ticket, None));
        }
        if self.held.is_none() {
            for waiter in &mut self.model.waiting {
                let output = self.outputs.iter().find(|it| it.0 == waiter.ticket);
                let &(_, input, max_tokens) = output.unwrap();
                let parts = 1_000_000 / self.weights[waiter.tenant];
                waiter.charge = parts * (input + 5 * u64::from(max_tokens));
            }
            expected.extend(self.model.serve().map(|it| (it.ticket, Some(it))));
        }
        let grants = self.real.take_grants(self.now);
        assert_eq!(grants.len(), expected.len());
        for (grant, (ticket, waiter)) in grants.into_iter().zip(expected) {
            assert_eq!(grant.ticket, ticket, "another one was served");
            let Some(waiter) = waiter else {
                assert_eq!(grant.outcome, Err(SchedulerError::DeadlineExceeded));
                continue;
            };
            let (_, reservation) = reservation(grant);
            let &(.., max_tokens) = self.outputs.iter().find(|it| it.0 == ticket).unwrap();
            let per_output = 5 * (1_000_000 / self.weights[waiter.tenant]);
            let who = (waiter.class, waiter.tenant);
            self.held = Some((reservation.id, who, per_output, max_tokens));
        }
        let deadlines = self.model.waiting.iter().filter_map(|it| it.deadline);
        assert_eq!(self.real.next_deadline(), deadlines.min());
        self.real.check_integrity();
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Acquire {
                tenant,
                class,
                prefix,
                length,
                max_tokens,
                deadline,
            } => {
                let deadline = deadline.map(Time);
                self.acquire((tenant, class), &vec![prefix; length], max_tokens, deadline);
            }
            Op::End(num_output_tokens) => self.end(num_output_tokens),
            Op::Cancel(pick) => {
                if let Some(index) = pick.checked_rem(self.model.waiting.len()) {
                    let ticket = self.model.waiting[index].ticket;
                    self.model.remove(ticket);
                    assert!(self.real.cancel(ticket) && !self.real.cancel(ticket));
                }
            }
            Op::Wait(micros) => self.now.0 += micros,
            Op::Weigh(tenant, weight) => {
                self.weights[tenant] = weight.into();
                let name = format!("t{tenant}");
                self.real.set_tenant_weight(&name, weight).unwrap();
            }
        }
        self.settle();
    }
}

proptest! {
    #[test]
    fn the_order_is_the_models(
        max_overtakes in prop::sample::select(vec![0_u64, 3, 12, 1_000]),
        max_tenant_overtakes in 0_u64..6,
        class_weights in prop::array::uniform3(1_u64..6),
        max_num_waiting in prop::sample::select(vec![1_u32, 4, 1_000]),
        ops in prop::collection::vec(op(), 1..100),
    ) {
        let limits = Limits { max_overtakes, max_tenant_overtakes, class_weights };
        let mut pair = Pair::new(limits, max_num_waiting);
        for op in &ops {
            pair.apply(op);
        }
        while pair.held.is_some() {
            pair.end(None);
            pair.settle();
        }
        prop_assert!(pair.model.waiting.is_empty(), "somebody was forgotten");
    }
}
