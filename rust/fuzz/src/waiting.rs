//! Requests that wait for workers: by class, tenant and deadline, while workers fill up, drain and leave.

use arbitrary::{Arbitrary, Unstructured};
use orchestra_core::{
    Time,
    scheduler::{
        AdmissionClass, Granted, ReservationId, RouteRequest, Scheduler, SchedulerConfig, TicketId,
        Wait, WorkerSpec,
    },
};

use crate::operations;

#[derive(Debug, Arbitrary)]
enum Op {
    Acquire {
        num_tokens: u8,
        max_tokens: u8,
        tenant: u8,
        class: u8,
        slo_class: bool,
        deadline: Option<u16>,
    },
    Cancel(u8),
    PrefillDone(u8),
    Finish(u8, u8),
    Release(u8),
    AddWorker(u8, bool),
    RemoveWorker(u8),
    SetDraining(u8, bool),
    SetTenantWeight(u8, u16),
    Wait(u16),
}

/// Who holds and who waits.
#[derive(Default)]
struct Books {
    held: Vec<ReservationId>,
    tickets: Vec<TicketId>,
}

/// Any operations, in any order, with any figures.
///
/// # Panics
/// If an invariant breaks, a ticket is answered twice, or one is forgotten.
pub fn waiting(data: &[u8]) {
    let input = Unstructured::new(data);
    let config = SchedulerConfig {
        max_num_workers: 4,
        max_num_waiting: 10,
        max_num_waiting_per_tenant: 6,
        refuse_hopeless: data.len() % 2 == 1,
        ..SchedulerConfig::default()
    };
    let Ok(mut scheduler) = Scheduler::new(config) else {
        return;
    };
    let (mut books, mut now) = (Books::default(), Time::ZERO);
    for op in operations::<Op>(input) {
        apply(&mut scheduler, &mut books, &mut now, &op);
        take_grants(&mut scheduler, &mut books, now);
        scheduler.check_integrity();
        let stats = scheduler.stats(now);
        assert_eq!(stats.num_waiting_requests, books.tickets.len() as u64);
    }
    for ticket in books.tickets {
        assert!(scheduler.cancel(ticket), "nobody answered it");
    }
    for id in books.held {
        scheduler.release(id);
    }
    assert_eq!(scheduler.stats(now).num_reservations, 0);
}

fn apply(scheduler: &mut Scheduler, books: &mut Books, now: &mut Time, op: &Op) {
    match *op {
        Op::Acquire { .. } => acquire(scheduler, books, *now, op),
        Op::Cancel(pick) => {
            if usize::from(pick) < books.tickets.len() {
                assert!(scheduler.cancel(books.tickets.swap_remove(pick.into())));
            }
        }
        Op::PrefillDone(pick) => {
            if let Some(&id) = books.held.get(usize::from(pick)) {
                scheduler.prefill_done(id, *now);
            }
        }
        Op::Finish(pick, num_tokens) if usize::from(pick) < books.held.len() => {
            scheduler.finish(books.held.swap_remove(pick.into()), num_tokens.into());
        }
        Op::Release(pick) if usize::from(pick) < books.held.len() => {
            scheduler.release(books.held.swap_remove(pick.into()));
        }
        Op::Finish(..) | Op::Release(_) => {}
        Op::SetTenantWeight(tenant, weight) => {
            let is_valid = (1..=10_000).contains(&weight);
            let set = scheduler.set_tenant_weight(&name("tenant", tenant), weight.into());
            assert_eq!(set.is_ok(), is_valid);
        }
        Op::Wait(micros) => now.0 += u64::from(micros),
        _ => change_worker(scheduler, op),
    }
}

fn change_worker(scheduler: &mut Scheduler, op: &Op) {
    match *op {
        Op::AddWorker(worker, is_dedicated) => {
            let spec = WorkerSpec {
                name: name("worker", worker),
                model: "model".to_owned(),
                block_size: 4,
                num_blocks: 20,
                max_num_seqs: 2,
                max_model_len: 100,
                slo_classes: is_dedicated
                    .then(|| "batch".to_owned())
                    .into_iter()
                    .collect(),
                ..WorkerSpec::default()
            };
            let known = scheduler.worker_by_name(&spec.name);
            let added = scheduler.add_worker(spec);
            assert!(added.is_err() || known.is_none());
        }
        Op::RemoveWorker(worker) => {
            if let Some(id) = scheduler.worker_by_name(&name("worker", worker)) {
                assert!(scheduler.remove_worker(id));
            }
        }
        Op::SetDraining(worker, on) => {
            if let Some(id) = scheduler.worker_by_name(&name("worker", worker)) {
                assert!(scheduler.set_draining(id, on));
            }
        }
        _ => {}
    }
}

fn acquire(scheduler: &mut Scheduler, books: &mut Books, now: Time, op: &Op) {
    let &Op::Acquire {
        num_tokens,
        max_tokens,
        tenant,
        class,
        slo_class,
        deadline,
    } = op
    else {
        return;
    };
    let token_ids = vec![u32::from(tenant % 2); usize::from(num_tokens % 70)];
    let request = RouteRequest {
        model: "model",
        token_ids: &token_ids,
        max_tokens: u32::from(max_tokens % 40),
        tenant: &name("tenant", tenant),
        class: match class % 3 {
            0 => AdmissionClass::Interactive,
            1 => AdmissionClass::Standard,
            _ => AdmissionClass::Batch,
        },
        slo_class: if slo_class { "batch" } else { "" },
        // Up to the present, it is past.
        deadline: deadline.map(|micros| Time(u64::from(micros) * 16)),
        ..RouteRequest::default()
    };
    match scheduler.acquire(&request, now) {
        Ok(Wait::Granted(reservation)) => books.held.push(reservation.id),
        Ok(Wait::Waiting(ticket)) => books.tickets.push(ticket),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Each grant answers a ticket that waits, and nobody waits beyond a deadline.
fn take_grants(scheduler: &mut Scheduler, books: &mut Books, now: Time) {
    for grant in scheduler.take_grants(now) {
        let place = books.tickets.iter().position(|&it| it == grant.ticket);
        assert!(place.is_some(), "nobody waits with this ticket");
        if let Some(place) = place {
            books.tickets.swap_remove(place);
        }
        if let Ok(Granted::Reservation(reservation)) = grant.outcome {
            books.held.push(reservation.id);
        }
    }
    assert!(
        scheduler
            .next_deadline()
            .is_none_or(|deadline| deadline > now)
    );
}

fn name(kind: &str, number: u8) -> String {
    format!("{kind}-{}", number % 6)
}
