//! A script that a person can read: `testdata/scheduler/admission.txt`, and the snapshot of what it answered.
//! `INSTA_UPDATE=always cargo test` refreshes it; review the diff.

use std::{collections::BTreeMap, fmt::Write};

use super::*;

struct Stage {
    scheduler: Scheduler,
    now: Time,
    names: BTreeMap<TicketId, String>,
    held: BTreeMap<String, Reservation>,
}

impl Stage {
    fn new() -> Self {
        let config = SchedulerConfig {
            max_num_waiting: 8,
            ..SchedulerConfig::default()
        };
        Self {
            scheduler: Scheduler::new(config).unwrap(),
            now: Time::ZERO,
            names: BTreeMap::new(),
            held: BTreeMap::new(),
        }
    }

    fn run(&mut self, line: &str) -> String {
        let (mut words, mut settings) = (Vec::new(), BTreeMap::new());
        for part in line.split_whitespace() {
            match part.split_once('=') {
                Some((key, value)) => drop(settings.insert(key, value)),
                None => words.push(part),
            }
        }
        let number = |key, default| {
            let value = settings.get(key);
            value.map_or(default, |value| value.parse::<u32>().unwrap())
        };
        let name = words[1];
        let answer = match words[0] {
            "worker" => {
                add_worker(
                    &mut self.scheduler,
                    name,
                    number("seqs", 8),
                    number("blocks", 40),
                );
                String::new()
            }
            "at" => {
                self.now = Time(name.parse().unwrap());
                String::new()
            }
            "weight" => {
                let weight = number("is", 100);
                self.scheduler.set_tenant_weight(name, weight).unwrap();
                String::new()
            }
            "cancel" => {
                let ticket = self.names.iter().find(|(_, of)| *of == name);
                let cancelled = self.scheduler.cancel(*ticket.unwrap().0);
                assert!(cancelled);
                String::new()
            }
            "finish" => match self.held.remove(name) {
                Some(reservation) => {
                    self.scheduler.finish(reservation.id, number("output", 0));
                    String::new()
                }
                None => "does not run\n".to_owned(),
            },
            "acquire" => {
                let class = settings.get("class").copied().unwrap_or("standard");
                let prompt = vec![number("prefix", 0); number("prompt", 16) as usize];
                let tenant = settings.get("tenant").copied().unwrap_or_default();
                let deadline = settings.get("by").map(|by| Time(by.parse().unwrap()));
                let request = RouteRequest {
                    class: AdmissionClass::parse(class).unwrap(),
                    deadline,
                    ..request(tenant, &prompt, number("output", 16))
                };
                self.acquire(name, &request)
            }
            verb => panic!("no such command: {verb}"),
        };
        answer + &self.take_grants()
    }

    fn acquire(&mut self, name: &str, request: &RouteRequest<'_>) -> String {
        match self.scheduler.acquire(request, self.now) {
            Ok(Wait::Granted(reservation)) => self.hold(name.to_owned(), reservation),
            Ok(Wait::Waiting(ticket)) => {
                self.names.insert(ticket, name.to_owned());
                "waits\n".to_owned()
            }
            Err(error) => format!("refused: {error}\n"),
        }
    }

    fn hold(&mut self, name: String, reservation: Reservation) -> String {
        let spec = self.scheduler.worker_spec(reservation.worker).unwrap();
        let text = format!("{name} goes to {}\n", spec.name);
        self.held.insert(name, reservation);
        text
    }

    fn take_grants(&mut self) -> String {
        let mut text = String::new();
        for grant in self.scheduler.take_grants(self.now) {
            let name = self.names.remove(&grant.ticket).unwrap();
            let line = match grant.outcome {
                Ok(Granted::Reservation(reservation)) => self.hold(name, reservation),
                Err(error) => format!("{name} ends: {error}\n"),
                other => panic!("not a reservation: {other:?}"),
            };
            text.push_str(&line);
        }
        text
    }
}

#[test]
fn script() {
    let mut stage = Stage::new();
    let mut transcript = String::new();
    for line in include_str!("../testdata/scheduler/admission.txt").lines() {
        writeln!(transcript, "{line}").unwrap();
        if line == "start over" {
            stage = Stage::new();
        } else if !line.is_empty() && !line.starts_with('#') {
            for answer in stage.run(line).lines() {
                writeln!(transcript, "    {answer}").unwrap();
            }
            stage.scheduler.check_integrity();
        }
    }
    insta::with_settings!({ snapshot_path => "../snapshots", prepend_module_to_snapshot => false }, {
        insta::assert_snapshot!("scheduler_admission__script", transcript);
    });
}
