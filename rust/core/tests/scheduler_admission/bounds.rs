//! What the order promises, against those who try to break it.

use super::*;

/// The most that one charge of a test is: 500 prompt and 200 output tokens, the latter twice.
const CHARGE_MAX: u64 = 900 * PARTS;

/// A request that waits, and how many later ones were served before it.
struct Victim {
    ticket: TicketId,
    num_overtakes: u64,
}

proptest! {
    /// Tenants that are new each time, requests that fit where others do not, cancellations, drains: nobody is
    /// overtaken more often than the bound says.
    #[test]
    fn nobody_starves(
        max_overtakes in 0_u32..12,
        max_bypasses in 0_u32..8,
        moves in prop::collection::vec((0_u32..10, any::<u32>()), 60..120),
    ) {
        let config = SchedulerConfig { max_overtakes, max_bypasses, ..SchedulerConfig::default() };
        let bound = u64::from(max_overtakes + max_bypasses + 1);
        let mut scheduler = Scheduler::new(config).unwrap();
        let workers = ["a", "b", "c"].map(|name| add_worker(&mut scheduler, name, 3, 40));
        let mut victims: Vec<Victim> = Vec::new();
        let mut held: Vec<ReservationId> = Vec::new();
        for (number, &(kind, dice)) in moves.iter().enumerate() {
            match kind {
                0..5 => {
                    // Few ask for a whole worker, most for little; every tenant is new or one of two.
                    let blocks = if dice % 7 == 0 { 40 } else { 1 + dice % 9 };
                    let tenant = if dice % 3 == 0 { "old".to_owned() } else { format!("t{number}") };
                    let class = AdmissionClass::ALL[dice as usize / 7 % 3];
                    let prompt = [dice];
                    let request = RouteRequest {
                        class,
                        ..request(&tenant, &prompt, blocks * BLOCK_SIZE - 1)
                    };
                    match scheduler.acquire(&request, Time::ZERO).unwrap() {
                        Wait::Granted(reservation) => held.push(reservation.id),
                        Wait::Waiting(ticket) => victims.push(Victim { ticket, num_overtakes: 0 }),
                    }
                }
                5..9 => {
                    if let Some(index) = (dice as usize).checked_rem(held.len()) {
                        scheduler.release(held.swap_remove(index));
                    }
                }
                _ if dice % 2 == 0 => {
                    // One worker is always open.
                    scheduler.set_draining(workers[dice as usize / 2 % 2], dice % 8 < 4);
                }
                _ => {
                    if let Some(index) = (dice as usize).checked_rem(victims.len()) {
                        prop_assert!(scheduler.cancel(victims.remove(index).ticket));
                    }
                }
            }
            for (ticket, reservation) in take(&mut scheduler) {
                held.push(reservation.id);
                let index = victims.iter().position(|it| it.ticket == ticket).unwrap();
                victims.remove(index);
                for earlier in &mut victims[..index] {
                    earlier.num_overtakes += 1;
                    prop_assert!(earlier.num_overtakes <= bound, "{} overtakes", earlier.num_overtakes);
                }
            }
            scheduler.check_integrity();
        }
        for worker in workers {
            scheduler.set_draining(worker, false);
        }
        while let Some(id) = held.pop() {
            scheduler.release(id);
            held.extend(take(&mut scheduler).iter().map(|(_, reservation)| reservation.id));
        }
        prop_assert_eq!(scheduler.stats(Time::ZERO).num_waiting_requests, 0);
    }

    /// Of two tenants that always have somebody waiting, neither gets ahead of the other by more than two charges of
    /// the largest kind, whatever their requests are and whoever comes and goes beside them.
    #[test]
    fn service_gap_of_two_backlogged_tenants(
        weights in prop::array::uniform2(prop::sample::select(vec![50_u32, 100, 200])),
        requests in prop::collection::vec((0_usize..6, 1_usize..500, 1_u32..200), 60..150),
    ) {
        let mut scheduler = counter(SchedulerConfig::default());
        let names = ["f", "g"];
        for (name, weight) in names.into_iter().zip(weights) {
            scheduler.set_tenant_weight(name, weight).unwrap();
        }
        let prompt = [1; 500];
        let mut held = granted(&mut scheduler, &request("other", &[1], 1));
        let mut charges: Vec<(TicketId, usize, u64)> = Vec::new();
        let mut num_waiting = [0; 2];
        let mut services = [0_i64; 2];
        let (mut low, mut high) = (0, 0);
        for (number, &(who, prefill, max_tokens)) in requests.iter().enumerate() {
            // Whoever of the two would have nobody waiting comes now; the rest is a flood of one of them and others.
            let who = num_waiting.iter().position(|&count| count < 2).unwrap_or(who % 4);
            let name = names.get(who).map_or(format!("x{}", number % 3), ToString::to_string);
            let ticket = waits(&mut scheduler, &request(&name, &prompt[..prefill], max_tokens));
            let cost = (prefill as u64 + 2 * u64::from(max_tokens)) * PARTS;
            let weight = weights.get(who).map_or(100, |&weight| weight.into());
            charges.push((ticket, who, cost * 100 / weight));
            if who < 2 {
                num_waiting[who] += 1;
            }
            if number < 8 {
                continue;
            }
            let ticket = next(&mut scheduler, &mut held).unwrap();
            let &(_, who, charge) = charges.iter().find(|it| it.0 == ticket).unwrap();
            if who < 2 {
                num_waiting[who] -= 1;
                services[who] += charge as i64;
                let lead = services[0] - services[1];
                (low, high) = (lead.min(low), lead.max(high));
                let largest = 2 * CHARGE_MAX; // at weight 50
                prop_assert!(high - low <= 2 * largest as i64, "{low}..{high}");
            }
        }
    }

    /// Classes get their shares among all that wait, and none waits for longer than the others' weights allow.
    #[test]
    fn a_lower_class_waits_for_a_bounded_number_of_grants(
        weights in prop::array::uniform3(1_u32..20),
        arrivals in prop::collection::vec(0_usize..3, 50..150),
    ) {
        let config = SchedulerConfig {
            interactive_weight: weights[0],
            standard_weight: weights[1],
            batch_weight: weights[2],
            max_num_waiting: 1_000,
            ..SchedulerConfig::default()
        };
        let mut scheduler = counter(config);
        let mut held = granted(&mut scheduler, &request("", &[1], 1));
        let mut classes: Vec<(TicketId, usize)> = Vec::new();
        let mut num_waiting = [0_u32; 3];
        // By class: what the others got since its last grant, or since it began to wait.
        let mut others = [[0_u32; 3]; 3];
        for &index in &arrivals {
            let missing = num_waiting.iter().position(|&count| count == 0);
            for index in missing.into_iter().chain([index]) {
                let class = AdmissionClass::ALL[index];
                let request = RouteRequest { class, ..request("", &[1], 1) };
                classes.push((waits(&mut scheduler, &request), index));
                num_waiting[index] += 1;
            }
            let ticket = next(&mut scheduler, &mut held).unwrap();
            let &(_, served) = classes.iter().find(|it| it.0 == ticket).unwrap();
            num_waiting[served] -= 1;
            others[served] = [0; 3];
            for waiting in (0..3).filter(|&class| class != served) {
                let count = if num_waiting[waiting] == 0 { 0 } else { others[waiting][served] + 1 };
                others[waiting][served] = count;
                let bound = weights[served] / weights[waiting] + 1;
                prop_assert!(count <= bound, "{served} got {count} before {waiting}: {weights:?}");
            }
        }
    }
}
