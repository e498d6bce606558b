//! Waiting for room: cancellation, gangs, and that every wait has exactly one end. The order of requests is tested in
//! `scheduler_admission`.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use orchestra_core::{
    ErrorCode, Time,
    scheduler::{
        GpuSpec, Grant, Granted, PlaceRequest, ReservationId, RouteRequest, Scheduler,
        SchedulerConfig, TicketId, Wait, WorkerId, WorkerSpec,
    },
};
use proptest::prelude::*;

fn scheduler(max_num_waiting: u32) -> Scheduler {
    let config = SchedulerConfig {
        max_num_waiting,
        extent_bytes: 1,
        ..SchedulerConfig::default()
    };
    Scheduler::new(config).unwrap()
}

fn add_worker(scheduler: &mut Scheduler, name: &str, max_num_seqs: u32) -> WorkerId {
    let spec = WorkerSpec {
        name: name.to_owned(),
        model: "m".to_owned(),
        weights_epoch: 0,
        block_size: 4,
        num_blocks: 10,
        max_num_seqs,
        max_model_len: 1000,
        ..WorkerSpec::default()
    };
    scheduler.add_worker(spec).unwrap()
}

/// One prompt token, so that the request needs `blocks` blocks of 4 tokens.
fn request(blocks: u32) -> RouteRequest<'static> {
    RouteRequest {
        model: "m",
        token_ids: &[7],
        max_tokens: blocks * 4 - 1,
        ..RouteRequest::default()
    }
}

fn acquire(scheduler: &mut Scheduler, blocks: u32) -> Wait<ReservationId> {
    match scheduler.acquire(&request(blocks), Time::ZERO).unwrap() {
        Wait::Granted(reservation) => Wait::Granted(reservation.id),
        Wait::Waiting(ticket) => Wait::Waiting(ticket),
    }
}

fn granted(grants: Vec<Grant>) -> Vec<(TicketId, ReservationId)> {
    let of = |grant: Grant| match grant.outcome {
        Ok(Granted::Reservation(reservation)) => (grant.ticket, reservation.id),
        other => panic!("not a reservation: {other:?}"),
    };
    grants.into_iter().map(of).collect()
}

#[test]
fn a_small_request_does_not_overtake_a_large_one() {
    let mut scheduler = scheduler(8);
    add_worker(&mut scheduler, "w", 100);
    let Wait::Granted(first) = acquire(&mut scheduler, 6) else {
        panic!("there was room")
    };
    let Wait::Waiting(large) = acquire(&mut scheduler, 8) else {
        panic!("there was no room")
    };
    let Wait::Waiting(small) = acquire(&mut scheduler, 1) else {
        panic!("it overtook")
    };
    assert!(scheduler.take_grants(Time::ZERO).is_empty());

    scheduler.release(first);
    let grants = granted(scheduler.take_grants(Time::ZERO));
    assert_eq!(
        grants.iter().map(|&(ticket, _)| ticket).collect::<Vec<_>>(),
        [large, small]
    );
}

#[test]
fn cancelling_the_head_serves_those_behind() {
    let mut scheduler = scheduler(8);
    add_worker(&mut scheduler, "w", 100);
    acquire(&mut scheduler, 6);
    let Wait::Waiting(large) = acquire(&mut scheduler, 8) else {
        panic!("there was no room")
    };
    let Wait::Waiting(small) = acquire(&mut scheduler, 1) else {
        panic!("it overtook")
    };
    assert!(scheduler.cancel(large));
    assert!(!scheduler.cancel(large));
    assert_eq!(granted(scheduler.take_grants(Time::ZERO))[0].0, small);
    assert!(
        !scheduler.cancel(small),
        "a granted ticket cannot be cancelled"
    );
}

#[test]
fn waiting_is_refused_where_it_could_not_help() {
    let mut scheduler = scheduler(1);
    let code = |scheduler: &mut Scheduler, blocks| {
        scheduler
            .acquire(&request(blocks), Time::ZERO)
            .err()
            .map(|error| error.code())
    };
    assert_eq!(code(&mut scheduler, 1), Some(ErrorCode::ModelNotFound));
    let worker = add_worker(&mut scheduler, "w", 1);
    assert_eq!(code(&mut scheduler, 11), Some(ErrorCode::ContextTooLong));
    acquire(&mut scheduler, 1);
    assert!(matches!(acquire(&mut scheduler, 1), Wait::Waiting(_)));
    assert_eq!(
        code(&mut scheduler, 11),
        Some(ErrorCode::ContextTooLong),
        "also behind others"
    );
    assert_eq!(code(&mut scheduler, 1), Some(ErrorCode::QueueFull));

    // The model goes away while somebody waits for it: that is an end too.
    scheduler.remove_worker(worker);
    let grants = scheduler.take_grants(Time::ZERO);
    let codes = grants
        .into_iter()
        .map(|grant| grant.outcome.map_err(|error| error.code()));
    assert_eq!(codes.collect::<Vec<_>>(), [Err(ErrorCode::ModelNotFound)]);
}

#[test]
fn a_drain_is_waited_out() {
    let mut scheduler = scheduler(8);
    let worker = add_worker(&mut scheduler, "w", 1);
    scheduler.set_draining(worker, true);
    assert!(matches!(acquire(&mut scheduler, 1), Wait::Waiting(_)));
    assert!(scheduler.take_grants(Time::ZERO).is_empty());
    scheduler.set_draining(worker, false);
    assert_eq!(granted(scheduler.take_grants(Time::ZERO)).len(), 1);
}

#[test]
fn gangs_wait_in_order_too() {
    let mut scheduler = scheduler(8);
    for name in ["g0", "g1"] {
        let (domain, node) = ("d".to_owned(), "n".to_owned());
        let spec = GpuSpec {
            name: name.to_owned(),
            domain,
            node,
            rack: None,
            memory_bytes: 10,
        };
        scheduler.add_gpu(spec).unwrap();
    }
    let gang = |num_gpus, bytes_per_gpu| PlaceRequest {
        num_gpus,
        bytes_per_gpu,
        ..PlaceRequest::default()
    };
    let Ok(Wait::Granted(first)) = scheduler.acquire_gpus(&gang(2, 6)) else {
        panic!("room")
    };
    let Ok(Wait::Waiting(second)) = scheduler.acquire_gpus(&gang(2, 5)) else {
        panic!("no room")
    };
    let Ok(Wait::Waiting(third)) = scheduler.acquire_gpus(&gang(1, 1)) else {
        panic!("overtook")
    };
    assert!(
        scheduler.acquire_gpus(&gang(3, 1)).is_err(),
        "no domain is that wide"
    );
    scheduler.release_placement(first.id);
    let grants = scheduler.take_grants(Time::ZERO);
    assert_eq!(
        grants.iter().map(|grant| grant.ticket).collect::<Vec<_>>(),
        [second, third]
    );
    assert!(
        grants
            .iter()
            .all(|grant| matches!(grant.outcome, Ok(Granted::Placement(_))))
    );
}

#[derive(Clone, Debug)]
enum Op {
    Acquire(u32),
    Release(usize),
    Cancel(usize),
}

proptest! {
    #[test]
    fn every_wait_ends_once(ops in prop::collection::vec(
        prop_oneof![
            3 => (1_u32..11).prop_map(Op::Acquire),
            2 => (0_usize..100).prop_map(Op::Release),
            1 => (0_usize..100).prop_map(Op::Cancel),
        ],
        1..150,
    )) {
        let mut scheduler = scheduler(1000);
        add_worker(&mut scheduler, "a", 3);
        add_worker(&mut scheduler, "b", 2);
        let mut waiting: Vec<TicketId> = Vec::new();
        let mut held: Vec<ReservationId> = Vec::new();
        for op in ops {
            match op {
                Op::Acquire(blocks) => match acquire(&mut scheduler, blocks) {
                    Wait::Granted(id) => {
                        prop_assert!(waiting.is_empty(), "overtook");
                        held.push(id);
                    }
                    Wait::Waiting(ticket) => waiting.push(ticket),
                },
                Op::Release(pick) => {
                    if let Some(index) = pick.checked_rem(held.len()) {
                        prop_assert!(scheduler.release(held.swap_remove(index)));
                    }
                }
                Op::Cancel(pick) => {
                    if let Some(index) = pick.checked_rem(waiting.len()) {
                        prop_assert!(scheduler.cancel(waiting.remove(index)));
                    }
                }
            }
            for (ticket, id) in granted(scheduler.take_grants(Time::ZERO)) {
                let index = waiting.iter().position(|&it| it == ticket);
                prop_assert!(index.is_some(), "a wait ended twice");
                waiting.remove(index.unwrap());
                held.push(id);
            }
            prop_assert!(!held.is_empty() || waiting.is_empty(), "idle workers, and somebody waits");
            scheduler.check_integrity();
        }
        while let Some(id) = held.pop() {
            scheduler.release(id);
            held.extend(granted(scheduler.take_grants(Time::ZERO)).into_iter().map(|(_, id)| id));
        }
        prop_assert_eq!(scheduler.stats(Time::ZERO).num_waiting_requests, 0);
    }
}
