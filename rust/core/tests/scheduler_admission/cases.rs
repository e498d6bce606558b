//! Cases that a person would try first.

use super::*;

/// Tenants in the order in which the requests are served.
fn order_of(scheduler: &mut Scheduler, held: &mut ReservationId, names: &[TicketId]) -> Vec<usize> {
    let served = std::iter::from_fn(|| next(scheduler, held));
    let index = |ticket| names.iter().position(|&it| it == ticket).unwrap();
    served.map(index).collect()
}

#[test]
fn a_flood_of_one_tenant_does_not_hold_up_another() {
    let mut scheduler = counter(SchedulerConfig::default());
    let mut held = granted(&mut scheduler, &request("", &[1], 1));
    let mut tickets: Vec<TicketId> = (0..6)
        .map(|_| waits(&mut scheduler, &request("flood", &[1], 8)))
        .collect();
    tickets.push(waits(&mut scheduler, &request("calm", &[1], 8)));
    tickets.push(waits(&mut scheduler, &request("calm", &[1], 8)));
    assert_eq!(
        order_of(&mut scheduler, &mut held, &tickets),
        [0, 6, 1, 7, 2, 3, 4, 5]
    );
}

#[test]
fn tenants_that_are_new_each_time_pass_one_that_owes_only_so_often() {
    let config = SchedulerConfig {
        max_overtakes: 20,
        ..SchedulerConfig::default()
    };
    let mut scheduler = counter(config);
    let mut held = granted(&mut scheduler, &request("", &[1], 1));
    let owing = waits(&mut scheduler, &request("owes", &[1], 100_000));
    waits(&mut scheduler, &request("new", &[1], 1));
    assert_eq!(next(&mut scheduler, &mut held), Some(owing));
    let victim = waits(&mut scheduler, &request("owes", &[1], 1));
    // Newcomers are lifted to the smallest counter, which is that of the last newcomer, who waits still.
    let mut num_served = 0;
    loop {
        let name = format!("new {num_served}");
        waits(&mut scheduler, &request(&name, &[1], 1));
        if next(&mut scheduler, &mut held) == Some(victim) {
            break;
        }
        num_served += 1;
    }
    assert_eq!(num_served, 1 + 20, "the first one came before it");
}

#[test]
fn twice_the_weight_is_twice_the_service() {
    let mut scheduler = counter(SchedulerConfig::default());
    scheduler.set_tenant_weight("b", 200).unwrap();
    let mut held = granted(&mut scheduler, &request("", &[1], 1));
    let mut tickets = Vec::new();
    for name in ["a", "a", "a", "b", "b", "b", "b"] {
        tickets.push(waits(&mut scheduler, &request(name, &[1], 8)));
    }
    assert_eq!(
        order_of(&mut scheduler, &mut held, &tickets),
        [0, 3, 4, 1, 5, 6, 2]
    );
    for (tenant, weight) in [("a", 0), ("a", 10_001)] {
        assert!(scheduler.set_tenant_weight(tenant, weight).is_err());
    }
    assert!(scheduler.set_tenant_weight(&"x".repeat(129), 1).is_err());
}

#[test]
fn output_that_did_not_come_is_given_back() {
    let mut scheduler = counter(SchedulerConfig::default());
    // Both ask for much; one says that little came of it, the other only that it is over.
    let mut held = granted(&mut scheduler, &request("", &[1], 1));
    let mut tickets = Vec::new();
    for name in ["says", "silent"] {
        for _ in 0..2 {
            tickets.push(waits(&mut scheduler, &request(name, &[1], 1_000)));
        }
    }
    tickets.push(waits(&mut scheduler, &request("says", &[1], 1_000)));
    assert_eq!(next(&mut scheduler, &mut held), Some(tickets[0]));
    assert!(scheduler.finish(held, 10) && !scheduler.finish(held, 10));
    let mut grants = take(&mut scheduler);
    assert_eq!(grants[0].0, tickets[2], "silent was not served at all yet");
    held = grants.remove(0).1.id;
    assert_eq!(
        order_of(&mut scheduler, &mut held, &tickets),
        [1, 3, 4],
        "says owes 21 against 2,001; then both about as much"
    );
}

#[test]
fn a_reservation_lost_with_its_worker_costs_nothing() {
    let mut scheduler = counter(SchedulerConfig::default());
    let lost = scheduler.worker_by_name("w").unwrap();
    granted(&mut scheduler, &request("unlucky", &[1], 1_000));
    let mut tickets = Vec::new();
    for name in ["unlucky", "other", "unlucky"] {
        tickets.push(waits(&mut scheduler, &request(name, &[1], 1_000)));
    }
    add_worker(&mut scheduler, "v", 1, 100_000);
    let (first, reservation) = take(&mut scheduler)[0];
    assert_eq!(first, tickets[0], "who waits since before");
    scheduler.remove_worker(lost);
    scheduler.check_integrity();
    let mut held = reservation.id;
    assert_eq!(order_of(&mut scheduler, &mut held, &tickets), [1, 2]);
}

#[test]
fn requests_with_a_common_prefix_follow_each_other() {
    let mut scheduler = counter(SchedulerConfig::default());
    let mut held = granted(&mut scheduler, &request("", &[1], 1));
    let prompts: [&[u32]; 5] = [&[7; 600], &[8; 600], &[9; 600], &[7; 700], &[8; 4_000]];
    let tickets: Vec<TicketId> = prompts
        .iter()
        .map(|prompt| waits(&mut scheduler, &request("", prompt, 1)))
        .collect();
    assert_eq!(
        order_of(&mut scheduler, &mut held, &tickets),
        [0, 1, 3, 2, 4],
        "as far ahead as its own arrival allows: the last one could follow 1 only at the cost of 2"
    );

    let mut tickets = Vec::new();
    held = granted(&mut scheduler, &request("", &[1], 1));
    let prompts: [&[u32]; 5] = [
        &[7; 3_000],
        &[8; 3_100],
        &[9; 3_000],
        &[7; 4_000],
        &[8; 4_000],
    ];
    for prompt in prompts {
        tickets.push(waits(&mut scheduler, &request("", prompt, 1)));
    }
    assert_eq!(
        order_of(&mut scheduler, &mut held, &tickets),
        [0, 3, 1, 4, 2]
    );
}

#[test]
fn a_long_prompt_is_overtaken_by_as_many_as_may() {
    for max_tenant_overtakes in [0, 1, 20] {
        let config = SchedulerConfig {
            max_tenant_overtakes,
            ..SchedulerConfig::default()
        };
        let mut scheduler = counter(config);
        let mut held = granted(&mut scheduler, &request("", &[1], 1));
        let long = vec![1; 50_000];
        let long = waits(&mut scheduler, &request("", &long, 1));
        let mut num_served = 0;
        loop {
            waits(&mut scheduler, &request("", &[1], 1));
            if next(&mut scheduler, &mut held) == Some(long) {
                break;
            }
            num_served += 1;
        }
        assert_eq!(num_served, max_tenant_overtakes);
    }
}

#[test]
fn a_large_request_holds_one_worker_and_the_others_go_on() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    for name in ["a", "b"] {
        add_worker(&mut scheduler, name, 8, 40);
    }
    let blocks = |blocks: u32| request("", &[1], blocks * BLOCK_SIZE - 1);
    let first: Vec<ReservationId> = (0..4)
        .map(|_| granted(&mut scheduler, &blocks(15)))
        .collect();
    let large = waits(&mut scheduler, &blocks(40));
    let mut small: Vec<TicketId> = (0..4).map(|_| waits(&mut scheduler, &blocks(10))).collect();
    // Ten blocks are free on each: one is for the large one, the other takes one small request after another.
    let grants = take(&mut scheduler);
    assert_eq!(grants.len(), 1, "{grants:?}");
    let (ticket, mut beside) = grants[0];
    let other = beside.worker;
    assert_eq!(ticket, small.remove(0));
    while let Some(expected) = small.first().copied() {
        scheduler.release(beside.id);
        let grants = take(&mut scheduler);
        assert_eq!((grants[0].0, grants.len()), (expected, 1));
        beside = grants[0].1;
        assert_eq!(beside.worker, other, "not on the one that is held");
        small.remove(0);
    }
    // The anonymous arrivals of `route` are not part of the queue, and take what there is.
    let now = Time::ZERO;
    assert_ne!(scheduler.route(&blocks(10), now).unwrap().worker, other);
    for id in first {
        scheduler.release(id);
    }
    let grants = take(&mut scheduler);
    assert_eq!(
        grants.len(),
        0,
        "what was routed is still there: {grants:?}"
    );
    scheduler.release(beside.id);
    assert_eq!(take(&mut scheduler)[0].0, large, "either worker will do");
}

#[test]
fn a_queue_whose_workers_are_full_holds_up_no_other_kind() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    for class in ["gold", "lead"] {
        let spec = WorkerSpec {
            name: class.to_owned(),
            model: "m".to_owned(),
            block_size: BLOCK_SIZE,
            num_blocks: 100,
            max_num_seqs: 1,
            max_model_len: 1_000,
            slo_classes: vec![class.to_owned()],
            ..WorkerSpec::default()
        };
        scheduler.add_worker(spec).unwrap();
    }
    let of = |slo_class| RouteRequest {
        slo_class,
        ..request("", &[1], 1)
    };
    granted(&mut scheduler, &of("lead"));
    for _ in 0..100 {
        waits(&mut scheduler, &of("lead"));
    }
    let gold = granted(&mut scheduler, &of("gold"));
    let waiting = waits(&mut scheduler, &of("gold"));
    scheduler.release(gold);
    let grants = take(&mut scheduler);
    assert_eq!((grants[0].0, grants.len()), (waiting, 1));
    scheduler.check_integrity();
}

#[test]
fn a_worker_that_is_held_takes_no_other_kind_either() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    let shared = add_worker(&mut scheduler, "shared", 8, 40);
    let gold = WorkerSpec {
        name: "gold".to_owned(),
        model: "m".to_owned(),
        block_size: BLOCK_SIZE,
        num_blocks: 30,
        max_num_seqs: 8,
        max_model_len: 1_000,
        slo_classes: vec!["gold".to_owned()],
        ..WorkerSpec::default()
    };
    let gold = scheduler.add_worker(gold).unwrap();
    let plain = |blocks: u32| request("", &[1], blocks * BLOCK_SIZE - 1);
    let of_gold = |blocks: u32| RouteRequest {
        slo_class: "gold",
        ..plain(blocks)
    };
    let half = granted(&mut scheduler, &plain(20));
    let whole = waits(&mut scheduler, &plain(40));
    assert!(take(&mut scheduler).is_empty());
    // There is room on both; one of them is held.
    for _ in 0..3 {
        let Wait::Granted(reservation) = scheduler.acquire(&of_gold(10), Time::ZERO).unwrap()
        else {
            panic!("there was room")
        };
        assert_eq!(reservation.worker, gold);
    }
    let small = waits(&mut scheduler, &of_gold(10));
    assert!(take(&mut scheduler).is_empty());
    // Cancelled, it holds nothing, and the other kind is served in the same breath.
    scheduler.cancel(whole);
    let grants = take(&mut scheduler);
    assert_eq!((grants[0].0, grants[0].1.worker), (small, shared));
    scheduler.release(half);
    scheduler.check_integrity();
}

#[test]
fn one_tenant_cannot_fill_the_queue() {
    let config = SchedulerConfig {
        max_num_waiting: 5,
        max_num_waiting_per_tenant: 3,
        ..SchedulerConfig::default()
    };
    let mut scheduler = counter(config);
    granted(&mut scheduler, &request("", &[1], 1));
    for _ in 0..3 {
        waits(&mut scheduler, &request("flood", &[1], 1));
    }
    let refused = |scheduler: &mut Scheduler, tenant| {
        let answer = scheduler.acquire(&request(tenant, &[1], 1), Time::ZERO);
        let error = answer.unwrap_err();
        (error.current(), error.limit(), error.to_string())
    };
    let message = "there are 3 waiting requests of this tenant, the limit is 3";
    assert_eq!(
        refused(&mut scheduler, "flood"),
        (Some(3), Some(3), message.to_owned())
    );
    for _ in 0..2 {
        waits(&mut scheduler, &request("calm", &[1], 1));
    }
    let message = "there are 5 waiting requests, the limit is 5";
    assert_eq!(
        refused(&mut scheduler, "calm"),
        (Some(5), Some(5), message.to_owned())
    );
    let long = "x".repeat(129);
    let answer = scheduler.acquire(&request(&long, &[1], 1), Time::ZERO);
    assert!(matches!(
        answer,
        Err(SchedulerError::InvalidField {
            field: "tenant",
            ..
        })
    ));
}

#[test]
fn tenants_that_come_once_are_forgotten() {
    let config = SchedulerConfig {
        max_num_tenants: 10,
        ..SchedulerConfig::default()
    };
    let mut scheduler = counter(config);
    let mut held = granted(&mut scheduler, &request("", &[1], 1));
    // Somebody always waits, so every other one ends up ahead of the floor and is worth remembering.
    for number in 0..2_000_u32 {
        let tenant = format!("t{number}");
        waits(&mut scheduler, &request(&tenant, &[1], 1 + number % 50));
        if number > 4 {
            next(&mut scheduler, &mut held).unwrap();
        }
        if number % 100 == 0 {
            scheduler.check_integrity();
        }
    }
    for number in 0..10 {
        scheduler
            .set_tenant_weight(&format!("t{number}"), 7)
            .unwrap();
    }
    assert!(scheduler.set_tenant_weight("one more", 7).is_err());
    scheduler.set_tenant_weight("t0", 100).unwrap();
    scheduler.set_tenant_weight("one more", 7).unwrap();
}
