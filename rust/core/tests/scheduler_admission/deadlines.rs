//! Deadlines and predictions.

use std::time::Duration;

use super::*;

const MS: u64 = 1_000;

fn by(deadline: u64) -> RouteRequest<'static> {
    RouteRequest {
        deadline: Some(Time(deadline)),
        ..request("", &[1; 100], 1)
    }
}

/// A counter whose worker computes 1,000 prompt tokens in 100 ms, as it has shown.
fn trained(config: SchedulerConfig) -> Scheduler {
    let mut scheduler = counter(config);
    let now = Time(50 * MS);
    let Ok(Wait::Granted(first)) = scheduler.acquire(&request("", &[1; 1_000], 1), now) else {
        panic!("there was room")
    };
    assert!(scheduler.prefill_done(first.id, now + Duration::from_millis(100)));
    scheduler.finish(first.id, 1);
    scheduler
}

#[test]
fn a_wait_ends_at_its_deadline() {
    let mut scheduler = counter(SchedulerConfig::default());
    assert_eq!(
        scheduler.acquire(&by(0), Time::ZERO),
        Err(SchedulerError::DeadlineExceeded),
        "past on arrival, although there is room"
    );
    let held = granted(&mut scheduler, &by(10));
    let late = waits(&mut scheduler, &by(20));
    let early = waits(&mut scheduler, &by(10));
    let patient = waits(&mut scheduler, &request("", &[1], 1));
    assert_eq!(scheduler.next_deadline(), Some(Time(10)));
    assert!(scheduler.take_grants(Time(9)).is_empty());
    let ended = scheduler.take_grants(Time(10));
    let expected = Grant {
        ticket: early,
        outcome: Err(SchedulerError::DeadlineExceeded),
    };
    assert_eq!(ended, [expected]);
    assert_eq!(scheduler.next_deadline(), Some(Time(20)));
    assert!(scheduler.cancel(late) && !scheduler.cancel(early));
    assert_eq!(scheduler.next_deadline(), None);
    scheduler.release(held);
    assert_eq!(take(&mut scheduler)[0].0, patient);
}

#[test]
fn room_that_comes_with_the_deadline_comes_too_late() {
    let mut scheduler = counter(SchedulerConfig::default());
    let held = granted(&mut scheduler, &by(10));
    let late = waits(&mut scheduler, &by(10));
    scheduler.release(held);
    let grants = scheduler.take_grants(Time(10));
    assert_eq!((grants[0].ticket, grants.len()), (late, 1));
    assert_eq!(grants[0].outcome, Err(SchedulerError::DeadlineExceeded));
    assert_eq!(scheduler.stats(Time(10)).num_reservations, 0);
}

#[test]
fn the_prediction_is_work_over_speed_and_the_wait_before_it() {
    let mut scheduler = counter(SchedulerConfig::default());
    assert_eq!(scheduler.predict_ttft(&by(0)), None, "nothing is known");
    scheduler = trained(SchedulerConfig::default());
    let (_, worker) = scheduler.workers().next().unwrap();
    assert_eq!(worker.prefill_tokens_per_s, 10_000);
    let in_ms = |ms| Some(Duration::from_millis(ms));
    assert_eq!(scheduler.predict_ttft(&by(0)), in_ms(10), "100 tokens");
    assert_eq!(
        scheduler.predict_ttft(&request("", &[], 1)),
        None,
        "not a request"
    );

    // With a request there the next one would wait; how long is not known before anybody did.
    let mut held = granted(&mut scheduler, &request("", &[1; 300], 1));
    assert_eq!(scheduler.predict_ttft(&by(0)), None);
    for number in 1..4 {
        let now = Time(number * 40 * MS);
        let waiting = scheduler.acquire(&request("", &[1; 300], 1), now);
        assert!(matches!(waiting, Ok(Wait::Waiting(_))));
        scheduler.release(held);
        let grants = scheduler.take_grants(now + Duration::from_millis(25));
        held = reservation(grants[0].clone()).1.id;
    }
    // A grant takes 25 ms, and 300 tokens are queued before the 100.
    assert_eq!(scheduler.predict_ttft(&by(0)), in_ms(25 + 30 + 10));
    for _ in 0..3 {
        waits(&mut scheduler, &request("", &[1; 300], 1));
    }
    assert_eq!(scheduler.predict_ttft(&by(0)), in_ms(4 * 25 + 40));
    let other = request("other", &[1; 100], 1);
    assert_eq!(
        scheduler.predict_ttft(&other),
        in_ms(2 * 25 + 40),
        "a tenant of its own shares, and does not queue behind the first one's three"
    );
    let batch = RouteRequest {
        class: AdmissionClass::Batch,
        ..other
    };
    assert_eq!(
        scheduler.predict_ttft(&batch),
        in_ms(4 * 25 + 40),
        "one in five, and never behind more than wait"
    );
}

#[test]
fn a_worker_s_idle_time_and_a_prompt_done_twice_teach_nothing() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    add_worker(&mut scheduler, "w", 8, 1_000);
    let at = |ms| Time(ms * MS);
    let mut place = |ms, tokens: usize| {
        let prompt = vec![1; tokens];
        let reservation = scheduler.route(&request("", &prompt, 1), at(ms));
        reservation.unwrap().id
    };
    // Two prompts come together and are computed one after the other; then one comes after a pause.
    let prompts = [place(0, 1_000), place(0, 500), place(900, 200)];
    for (id, done) in prompts.into_iter().zip([100, 150, 920]) {
        assert!(scheduler.prefill_done(id, at(done)));
    }
    assert!(!scheduler.prefill_done(prompts[0], at(5_000)));
    let (_, worker) = scheduler.workers().next().unwrap();
    assert_eq!(worker.prefill_tokens_per_s, 10_000);
}

#[test]
fn what_cannot_be_in_time_is_refused_where_that_is_wanted() {
    let acquire = |refuse_hopeless, deadline| {
        let config = SchedulerConfig {
            refuse_hopeless,
            ..SchedulerConfig::default()
        };
        let mut scheduler = trained(config);
        scheduler.acquire(&by(deadline), Time::ZERO).map(|_| ())
    };
    assert_eq!(acquire(true, 10 * MS), Ok(()));
    let refused = acquire(true, 9 * MS).unwrap_err();
    let expected = SchedulerError::DeadlineHopeless {
        predicted: Duration::from_millis(10),
        left: Duration::from_millis(9),
    };
    assert_eq!(refused, expected);
    assert_eq!(
        refused.to_string(),
        "the first token is predicted in 10 ms, the deadline is in 9 ms"
    );
    assert_eq!(acquire(false, 9 * MS), Ok(()), "it may try");
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let config = SchedulerConfig {
        max_num_waiting: 2,
        ..SchedulerConfig::default()
    };
    let mut scheduler = counter(config);
    let held = granted(&mut scheduler, &request("", &[1], 1));
    for _ in 0..2 {
        waits(&mut scheduler, &request("", &[1], 1));
    }
    let refusal = |scheduler: &mut Scheduler, now| {
        let answer = scheduler.acquire(&request("", &[1], 1), now);
        answer.unwrap_err().retry_after()
    };
    assert_eq!(refusal(&mut scheduler, Time::ZERO), None, "who knows");
    scheduler.release(held);
    let now = Time(30 * MS);
    assert_eq!(scheduler.take_grants(now).len(), 1);
    let again = scheduler.acquire(&request("", &[1], 1), now);
    assert!(matches!(again, Ok(Wait::Waiting(_))));
    assert_eq!(
        refusal(&mut scheduler, now),
        Some(Duration::from_millis(3 * 30)),
        "two wait, and it would be the third"
    );
}
