//! Stopping a batch request for an interactive one: who is stopped, against a naive choice, and that nobody is stopped
//! for nothing.

use std::collections::BTreeMap;

use orchestra_core::scheduler::{Preemptible, Preemption, WorkerLoad};

use super::*;

fn of(class: AdmissionClass) -> RouteRequest<'static> {
    RouteRequest {
        class,
        ..request("", &[1], 15)
    }
}

fn after(reservation: ReservationId, num_computed_tokens: u64) -> Preemptible {
    Preemptible {
        reservation,
        num_computed_tokens,
        num_output_tokens: 1,
    }
}

#[test]
fn the_one_with_least_to_lose_stops_and_its_room_goes_to_who_waits() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    add_worker(&mut scheduler, "w", 3, 100);
    let batch = of(AdmissionClass::Batch);
    let running = [(); 3].map(|()| granted(&mut scheduler, &batch));
    waits(&mut scheduler, &batch);
    assert!(!scheduler.has_urgent());
    let urgent = waits(&mut scheduler, &of(AdmissionClass::Interactive));
    assert!(take(&mut scheduler).is_empty() && scheduler.has_urgent());
    let offered = vec![
        after(running[0], 9),
        after(running[1], 4),
        after(running[2], 4),
    ];
    let preemptions = scheduler.preempt(offered, Time::ZERO);
    let [Preemption { victim, grant }] = &preemptions[..] else {
        panic!("{preemptions:?}")
    };
    assert_eq!(*victim, running[2], "the newer of two alike");
    assert_eq!(grant.ticket, urgent);
    assert!(!scheduler.release(*victim), "it is gone");
    scheduler.check_integrity();
}

#[test]
fn only_batch_stops_and_only_for_interactive() {
    for (runs, waits_for, stops) in [
        (AdmissionClass::Batch, AdmissionClass::Interactive, true),
        (AdmissionClass::Batch, AdmissionClass::Standard, false),
        (AdmissionClass::Batch, AdmissionClass::Batch, false),
        (AdmissionClass::Standard, AdmissionClass::Interactive, false),
        (
            AdmissionClass::Interactive,
            AdmissionClass::Interactive,
            false,
        ),
    ] {
        let mut scheduler = counter(SchedulerConfig::default());
        let running = granted(&mut scheduler, &of(runs));
        waits(&mut scheduler, &of(waits_for));
        let preemptions = scheduler.preempt(vec![after(running, 1)], Time::ZERO);
        assert_eq!(!preemptions.is_empty(), stops, "{runs:?} for {waits_for:?}");
    }
}

#[test]
fn nobody_stops_where_that_is_not_enough_or_elsewhere() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    let small = add_worker(&mut scheduler, "small", 8, 10);
    let running = granted(&mut scheduler, &of(AdmissionClass::Batch));
    // The rest of it belongs to somebody whom no preemption here can reach.
    let load = WorkerLoad {
        num_running: 8,
        kv_blocks_used: 10,
        ..WorkerLoad::default()
    };
    scheduler.update_load(small, load);
    let large = RouteRequest {
        class: AdmissionClass::Interactive,
        ..request("", &[1], 31)
    };
    waits(&mut scheduler, &large);
    let offer = |scheduler: &mut Scheduler| scheduler.preempt(vec![after(running, 1)], Time::ZERO);
    assert!(
        offer(&mut scheduler).is_empty(),
        "one block is freed, two are needed"
    );
    let load = WorkerLoad {
        kv_blocks_used: 9,
        ..load
    };
    scheduler.update_load(small, load);
    assert_eq!(take(&mut scheduler), []);
    scheduler.set_draining(small, true);
    assert!(offer(&mut scheduler).is_empty(), "it takes nobody");
    scheduler.set_draining(small, false);
    assert_eq!(offer(&mut scheduler).len(), 1);
    assert!(
        offer(&mut scheduler).is_empty(),
        "it is gone, and nobody waits"
    );
}

#[test]
fn a_seat_is_had_before_the_other_is_left() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    add_worker(&mut scheduler, "w", 8, 100);
    scheduler.limit_seats(1);
    let running = granted(&mut scheduler, &of(AdmissionClass::Batch));
    waits(&mut scheduler, &of(AdmissionClass::Interactive));
    let resumes = waits(&mut scheduler, &of(AdmissionClass::Batch));
    assert_eq!(
        scheduler.preempt(vec![after(running, 1)], Time::ZERO).len(),
        1
    );
    scheduler.leave_seat();
    assert_eq!(
        take(&mut scheduler),
        [],
        "the seat is the interactive one's"
    );
    scheduler.leave_seat();
    assert_eq!(take(&mut scheduler)[0].0, resumes);
}

proptest! {
    /// One worker, every request one block: as many interactive ones get room as there are batch ones to stop, those
    /// with least to lose first, and never anybody else.
    #[test]
    fn the_choice_is_the_naive_one(
        running in prop::collection::vec((prop::sample::select(&AdmissionClass::ALL[..]), 0_u64..20, any::<bool>()), 1..12),
        waiting in prop::collection::vec(prop::sample::select(&AdmissionClass::ALL[..]), 0..12),
    ) {
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        add_worker(&mut scheduler, "w", running.len() as u32, 1_000);
        let mut offered = Vec::new();
        let mut ranked = BTreeMap::new();
        for (index, &(class, computed, is_offered)) in running.iter().enumerate() {
            let id = granted(&mut scheduler, &of(class));
            if is_offered {
                offered.push(after(id, computed));
                if class == AdmissionClass::Batch {
                    ranked.insert((computed, std::cmp::Reverse(index)), id);
                }
            }
        }
        let mut urgent = Vec::new();
        for &class in &waiting {
            let ticket = waits(&mut scheduler, &of(class));
            urgent.extend((class == AdmissionClass::Interactive).then_some(ticket));
        }
        prop_assert!(take(&mut scheduler).is_empty());
        let preemptions = scheduler.preempt(offered, Time::ZERO);
        let num_stopped = urgent.len().min(ranked.len());
        let victims: Vec<_> = preemptions.iter().map(|it| it.victim).collect();
        let expected: Vec<_> = ranked.values().copied().take(num_stopped).collect();
        prop_assert_eq!(victims, expected);
        let served: Vec<_> = preemptions.into_iter().map(|it| reservation(it.grant).0).collect();
        prop_assert_eq!(served, urgent[..num_stopped].to_vec());
        prop_assert!(take(&mut scheduler).is_empty(), "as much is free as before");
        scheduler.check_integrity();
    }
}

#[test]
fn a_resumed_request_finds_a_full_queue_open_and_keeps_its_place_there() {
    let mut scheduler = counter(SchedulerConfig {
        max_num_waiting: 1,
        ..SchedulerConfig::default()
    });
    let held = granted(&mut scheduler, &of(AdmissionClass::Interactive));
    let newcomer = waits(&mut scheduler, &of(AdmissionClass::Batch));
    let resumed = match scheduler.reacquire(&of(AdmissionClass::Batch), Time::ZERO) {
        Ok(Wait::Waiting(ticket)) => ticket,
        other => panic!("{other:?}"),
    };
    // It is the newest of the lowest class, and yet it is the other one that goes.
    waits(&mut scheduler, &of(AdmissionClass::Interactive));
    let told = scheduler.take_grants(Time::ZERO);
    assert_eq!(
        told.iter().map(|it| it.ticket).collect::<Vec<_>>(),
        [newcomer]
    );
    let refused = scheduler.acquire(&of(AdmissionClass::Interactive), Time::ZERO);
    assert_eq!(refused.unwrap_err().code(), ErrorCode::QueueFull);
    scheduler.check_integrity();
    assert!(scheduler.cancel(resumed) && scheduler.release(held));
}
