//! How many requests run at once, and what comes with the first sequence of one.

use super::*;

#[test]
fn requests_wait_for_a_seat_though_there_is_room() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    add_worker(&mut scheduler, "w", 100, 100_000);
    scheduler.limit_seats(2);
    granted(&mut scheduler, &request("", &[1], 1));
    let second = granted(&mut scheduler, &request("", &[1], 1));
    let third = waits(&mut scheduler, &request("", &[1], 1));
    let fourth = waits(&mut scheduler, &request("", &[1], 1));
    // Its room is free, its seat is not.
    assert!(scheduler.finish(second, 1));
    assert_eq!(take(&mut scheduler), []);
    scheduler.leave_seat();
    let tickets = |grants: Vec<(TicketId, Reservation)>| {
        let tickets = grants.into_iter().map(|(ticket, _)| ticket);
        tickets.collect::<Vec<_>>()
    };
    assert_eq!(tickets(take(&mut scheduler)), [third]);
    assert_eq!(scheduler.num_seats_taken(), 2);
    scheduler.leave_seat();
    assert_eq!(tickets(take(&mut scheduler)), [fourth]);
    scheduler.leave_seat();
    scheduler.leave_seat();
    assert_eq!(scheduler.num_seats_taken(), 0);
}

#[test]
fn further_sequences_go_first_and_are_paid_for() {
    let mut scheduler = counter(SchedulerConfig::default());
    let mut held = granted(&mut scheduler, &request("", &[1], 1));
    let many = waits(&mut scheduler, &request("many", &[1], 1));
    let one = waits(&mut scheduler, &request("one", &[1], 1));
    // The tenant that came first would be next, had it not had these meanwhile.
    let more = request("many", &[1], 1_000);
    let choices = [(); 3].map(|()| scheduler.accompany(&more, Time::ZERO).unwrap());
    scheduler.check_integrity();
    for choice in choices {
        assert!(scheduler.finish(choice.id, 1_000));
    }
    assert_eq!(next(&mut scheduler, &mut held), Some(one));
    assert_eq!(next(&mut scheduler, &mut held), Some(many));
}

#[test]
fn room_is_kept_for_what_is_booked_and_a_worker_must_fit_all() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    add_worker(&mut scheduler, "w", 100, 10);
    let booked = |max_tokens, booked_tokens| RouteRequest {
        booked_tokens: Some(booked_tokens),
        ..request("", &[1; 16], max_tokens)
    };
    // Two blocks each, though every one of them might come to fill the worker.
    let all = 9 * BLOCK_SIZE;
    for _ in 0..5 {
        granted(&mut scheduler, &booked(all, 16));
    }
    waits(&mut scheduler, &booked(all, 16));
    let codes = [(all + 1, 16), (all, 0)].map(|(max_tokens, booked_tokens)| {
        let answer = scheduler.acquire(&booked(max_tokens, booked_tokens), Time::ZERO);
        answer.unwrap_err().code()
    });
    assert_eq!(
        codes,
        [ErrorCode::ContextTooLong, ErrorCode::InvalidRequest]
    );
}

#[test]
fn a_tenant_s_own_limit_counts_its_own_that_wait() {
    let mut scheduler = counter(SchedulerConfig::default());
    granted(&mut scheduler, &request("", &[1], 1));
    let limited = |limit| RouteRequest {
        queue_limit: Some(limit),
        ..request("few", &[1], 1)
    };
    waits(&mut scheduler, &request("many", &[1], 1));
    waits(&mut scheduler, &limited(1));
    let refused = scheduler.acquire(&limited(1), Time::ZERO).unwrap_err();
    let message = "there are 1 waiting requests of this tenant, the limit is 1";
    assert_eq!(refused.to_string(), message);
    waits(&mut scheduler, &limited(2));
}

#[test]
fn a_model_s_outputs_teach_what_to_book() {
    let mut scheduler = counter(SchedulerConfig::default());
    assert_eq!(scheduler.expected_output("m", 8), 8);
    assert_eq!(scheduler.expected_output("m", 8_000), 64);
    for _ in 0..100 {
        scheduler.output_ended("m", 500);
        scheduler.output_ended("unknown", 9);
    }
    assert!((500..=501).contains(&scheduler.expected_output("m", 8_000)));
    assert_eq!(scheduler.expected_output("unknown", 8_000), 64);
}

#[test]
fn an_open_worker_is_one_that_takes_requests_be_it_full() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    assert!(!scheduler.has_open_worker("m"));
    let worker = add_worker(&mut scheduler, "w", 1, 100);
    granted(&mut scheduler, &request("", &[1], 1));
    assert!(scheduler.has_open_worker("m"));
    scheduler.set_draining(worker, true);
    assert!(!scheduler.has_open_worker("m"));
}
