//! Scenario scripts: `testdata/scheduler/*.txt` are the commands, the snapshots show what each of them answered.
//! `INSTA_UPDATE=always cargo test` refreshes them; review the diff.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    fmt::{Display, Write},
    ops::Range,
};

use orchestra_core::{
    Time, block_hashes,
    scheduler::{
        GpuSpec, KvSource, Layout, NodeLimits, PlaceRequest, PlacedGpu, Placement, PlacementId,
        ReservationId, RouteRequest, Scheduler, SchedulerConfig, SchedulerError, Shares, WorkerId,
        WorkerLoad, WorkerSpec,
    },
    step::KvEvent,
};

const BLOCK_SIZE: u32 = 16;

/// One command: its positional words and its `key=value` settings.
struct Command<'a> {
    verb: &'a str,
    words: Vec<&'a str>,
    settings: Vec<(&'a str, u32)>,
}

impl<'a> Command<'a> {
    fn parse(line: &'a str) -> Self {
        let mut parts = line.split_whitespace();
        let verb = parts.next().unwrap();
        let (mut words, mut settings) = (Vec::new(), Vec::new());
        for part in parts {
            match part.split_once('=') {
                Some((key, value)) => settings.push((key, value.parse().unwrap())),
                None => words.push(part),
            }
        }
        Self {
            verb,
            words,
            settings,
        }
    }

    fn setting(&self, key: &str, default: u32) -> u32 {
        self.settings
            .iter()
            .find(|(name, _)| *name == key)
            .map_or(default, |&(_, value)| value)
    }

    fn number(&self, index: usize) -> u32 {
        self.words[index].parse().unwrap()
    }

    /// The prompt `from..to`: consecutive token ids.
    fn prompt(&self, index: usize) -> Vec<u32> {
        let (from, to) = self.words[index].split_once("..").unwrap();
        let range: Range<u32> = from.parse().unwrap()..to.parse().unwrap();
        range.collect()
    }
}

struct Stage {
    scheduler: Scheduler,
    /// In order of their making: scripts count from 1.
    reservations: Vec<ReservationId>,
    placements: Vec<PlacementId>,
}

impl Stage {
    fn new() -> Self {
        let config = SchedulerConfig {
            extent_bytes: 1,
            ..SchedulerConfig::default()
        };
        let scheduler = Scheduler::new(config).unwrap();
        Self {
            scheduler,
            reservations: Vec::new(),
            placements: Vec::new(),
        }
    }

    fn worker(&self, command: &Command<'_>) -> WorkerId {
        self.scheduler.worker_by_name(command.words[0]).unwrap()
    }

    fn name(&self, id: WorkerId) -> &str {
        &self.scheduler.worker_spec(id).unwrap().name
    }

    fn run(&mut self, command: &Command<'_>) -> String {
        match command.verb {
            "worker" => self.add_worker(command),
            "drain" | "undrain" => {
                self.scheduler
                    .set_draining(self.worker(command), command.verb == "drain");
                String::new()
            }
            "remove" => {
                self.scheduler.remove_worker(self.worker(command));
                String::new()
            }
            "stored" => self.stored(command),
            "cleared" => {
                let worker = self.worker(command);
                self.scheduler
                    .apply_kv_event(worker, &KvEvent::Cleared)
                    .map_or_else(refused, |()| String::new())
            }
            "expire_kv" => {
                self.scheduler.expire_kv(second(command));
                String::new()
            }
            "load" => self.load(command),
            "route" => self.route(command),
            "explain" => self.explain(command),
            "prefill_done" => {
                let id = self.reservations[command.number(0) as usize - 1];
                answer(self.scheduler.prefill_done(id, Time::ZERO))
            }
            "release" => {
                let id = self.reservations[command.number(0) as usize - 1];
                answer(self.scheduler.release(id))
            }
            "gpus" => self.add_gpus(command),
            "limit" => self.limit(command),
            "place" => self.place(command),
            "preview" => self.preview(command),
            "batch" => self.place_batch(command),
            "fail" | "restore" | "drain_domain" | "undrain_domain" | "expire" => {
                self.place_fault(command)
            }
            "release_placement" => {
                let id = self.placements[command.number(0) as usize - 1];
                answer(self.scheduler.release_placement(id))
            }
            "stats" => self.stats(),
            verb => panic!("no such command: {verb}"),
        }
    }

    fn add_worker(&mut self, command: &Command<'_>) -> String {
        let spec = WorkerSpec {
            name: command.words[0].to_owned(),
            model: "m".to_owned(),
            weights_epoch: 0,
            block_size: BLOCK_SIZE,
            num_blocks: command.setting("blocks", 100),
            max_num_seqs: command.setting("seqs", 8),
            max_model_len: command.setting("len", 1000),
            kv_source: match command.setting("assumed", 0) {
                0 => KvSource::Reported,
                max_blocks => KvSource::Assumed {
                    max_blocks,
                    ttl_s: command.setting("ttl", 0),
                },
            },
            ..WorkerSpec::default()
        };
        self.scheduler
            .add_worker(spec)
            .map_or_else(refused, |_| String::new())
    }

    fn stored(&mut self, command: &Command<'_>) -> String {
        let worker = self.worker(command);
        let seed = self
            .scheduler
            .worker_spec(worker)
            .unwrap()
            .hash_seed("", None);
        let hashes = block_hashes(seed, &command.prompt(1), BLOCK_SIZE as usize);
        let event = KvEvent::Stored(hashes);
        self.scheduler
            .apply_kv_event(worker, &event)
            .map_or_else(refused, |()| String::new())
    }

    fn load(&mut self, command: &Command<'_>) -> String {
        let load = WorkerLoad {
            num_running: command.setting("running", 0),
            num_waiting: command.setting("waiting", 0),
            kv_blocks_used: command.setting("used", 0),
            queued_prefill_tokens: command.setting("queued", 0).into(),
        };
        self.scheduler.update_load(self.worker(command), load);
        String::new()
    }

    fn route(&mut self, command: &Command<'_>) -> String {
        let token_ids = command.prompt(0);
        let request = request(&token_ids);
        match self.scheduler.route(&request, second(command)) {
            Ok(reservation) => {
                self.reservations.push(reservation.id);
                format!(
                    "#{} on {}: cached={} blocks={}\n",
                    self.reservations.len(),
                    self.name(reservation.worker),
                    reservation.num_cached_tokens,
                    reservation.num_blocks
                )
            }
            Err(error) => refused(error),
        }
    }

    fn explain(&self, command: &Command<'_>) -> String {
        let token_ids = command.prompt(0);
        let explanation = match self.scheduler.explain(&request(&token_ids), 8) {
            Ok(explanation) => explanation,
            Err(error) => return refused(error),
        };
        let mut text = String::new();
        for candidate in explanation.candidates {
            writeln!(
                text,
                "{}: cost={} cached={} queued={} batch={} free={}{}",
                self.name(candidate.worker),
                candidate.cost,
                candidate.num_cached_tokens,
                candidate.queued_prefill_tokens,
                candidate.batch,
                candidate.kv_blocks_free,
                if candidate.has_room { "" } else { " full" },
            )
            .unwrap();
        }
        for (worker, reason) in explanation.ineligible {
            writeln!(text, "{}: not eligible: {reason:?}", self.name(worker)).unwrap();
        }
        text
    }

    /// `domain num_gpus bytes [rack]`; the domain is one node.
    fn add_gpus(&mut self, command: &Command<'_>) -> String {
        let domain = command.words[0];
        for index in 0..command.number(1) {
            let spec = GpuSpec {
                name: format!("{domain}/{index}"),
                domain: domain.to_owned(),
                node: domain.to_owned(),
                rack: command.words.get(3).map(ToString::to_string),
                memory_bytes: command.number(2).into(),
            };
            self.scheduler.add_gpu(spec).unwrap();
        }
        String::new()
    }

    /// `node [cpu=] [host=] [nic=] [power=]`; the node's domain has its name.
    fn limit(&mut self, command: &Command<'_>) -> String {
        let limits = NodeLimits {
            cpu_milli: command.setting("cpu", 0).into(),
            host_memory_bytes: command.setting("host", 0).into(),
            nic_mbps: command.setting("nic", 0).into(),
        };
        let watts = command.setting("power", 0).into();
        let is_known = self.scheduler.set_domain_power(command.words[0], watts);
        match self.scheduler.set_node_limits(command.words[0], &limits) {
            Ok(()) => answer(is_known),
            Err(error) => refused(error),
        }
    }

    fn place(&mut self, command: &Command<'_>) -> String {
        let outcome = self.scheduler.place(&gang(command));
        self.placed(outcome)
    }

    fn placed(&mut self, outcome: Result<Placement, SchedulerError>) -> String {
        match outcome {
            Ok(placement) => {
                self.placements.push(placement.id);
                let head = format!("#{}:", self.placements.len());
                head + &self.gang_text(&placement.gpus, &placement.preempted)
            }
            Err(error) => refused(error),
        }
    }

    fn preview(&self, command: &Command<'_>) -> String {
        match self.scheduler.preview_place(&gang(command)) {
            Ok((gpus, preempted)) => "would be".to_owned() + &self.gang_text(&gpus, &preempted),
            Err(error) => refused(error),
        }
    }

    fn gang_text(&self, gpus: &[PlacedGpu], preempted: &[PlacementId]) -> String {
        let mut text = String::new();
        for placed in gpus {
            if placed.stage > 0 && !text.contains(&format!("| {}:", placed.stage)) {
                write!(text, " | {}:", placed.stage).unwrap();
            }
            let name = &self.scheduler.gpu_spec(placed.gpu).unwrap().name;
            let start = placed.extent.offset_bytes;
            let stop = start + placed.extent.length_bytes;
            write!(text, " {name}[{start}..{stop})").unwrap();
        }
        if !preempted.is_empty() {
            write!(text, " instead of {}", self.numbers(preempted)).unwrap();
        }
        text + "\n"
    }

    fn numbers(&self, ids: &[PlacementId]) -> String {
        let number = |id| {
            self.placements
                .iter()
                .position(|placed| placed == id)
                .unwrap()
                + 1
        };
        let numbers = ids.iter().map(|id| format!("#{}", number(id)));
        numbers.collect::<Vec<_>>().join(" ")
    }

    fn place_batch(&mut self, command: &Command<'_>) -> String {
        let requests = command.words.iter().map(|word| {
            let (num_gpus, bytes) = word.split_once('x').unwrap();
            PlaceRequest {
                num_gpus: num_gpus.parse().unwrap(),
                bytes_per_gpu: bytes.parse().unwrap(),
                ..PlaceRequest::default()
            }
        });
        let requests: Vec<PlaceRequest> = requests.collect();
        let outcomes = self.scheduler.place_batch(&requests);
        outcomes
            .into_iter()
            .map(|outcome| self.placed(outcome))
            .collect()
    }

    fn place_fault(&mut self, command: &Command<'_>) -> String {
        let word = command.words[0];
        let gone = match command.verb {
            "fail" => {
                let id = self.scheduler.gpu_by_name(word).unwrap();
                self.scheduler.fail_gpu(id).unwrap()
            }
            "restore" => {
                let id = self.scheduler.gpu_by_name(word).unwrap();
                return answer(self.scheduler.restore_gpu(id));
            }
            "expire" => {
                let now = Time(command.number(0).into());
                self.scheduler.expire_placements(now)
            }
            verb => {
                let is_draining = verb == "drain_domain";
                let here = self.scheduler.set_domain_draining(word, is_draining);
                return format!("holds {}\n", self.numbers(&here.unwrap()));
            }
        };
        format!("released {}\n", self.numbers(&gone))
    }

    fn stats(&self) -> String {
        let stats = self.scheduler.stats(Time::ZERO);
        let mut text = format!(
            "workers={} reservations={} index_entries={} placements={} gpu_free={}/{}\n",
            stats.num_workers,
            stats.num_reservations,
            stats.num_index_entries,
            stats.num_placements,
            stats.gpu_bytes_free,
            stats.gpu_bytes_total,
        );
        for (_, worker) in self.scheduler.workers() {
            let (name, batch) = (&worker.spec.name, worker.batch);
            let (queued, free) = (worker.queued_prefill_tokens, worker.kv_blocks_free);
            writeln!(text, "{name}: batch={batch} queued={queued} free={free}").unwrap();
        }
        text
    }
}

/// `num_gpus bytes [paged] [stages=] [kv=] [cpu=] [host=] [nic=] [power=] [priority=] [cost=] [expires=]`.
fn gang(command: &Command<'_>) -> PlaceRequest {
    let is_paged = command.words.contains(&"paged");
    let expires = command.setting("expires", 0);
    PlaceRequest {
        num_gpus: command.number(0),
        num_stages: command.setting("stages", 1),
        bytes_per_gpu: command.number(1).into(),
        paged_bytes_per_gpu: command.setting("kv", 0).into(),
        shares_per_gpu: Shares {
            cpu_milli: command.setting("cpu", 0).into(),
            host_memory_bytes: command.setting("host", 0).into(),
            nic_mbps: command.setting("nic", 0).into(),
            power_watts: command.setting("power", 0).into(),
        },
        priority: command.setting("priority", 0) as u8,
        layout: if is_paged {
            Layout::Paged
        } else {
            Layout::Contiguous
        },
        replay_cost: command.setting("cost", 0).into(),
        expires_at: (expires > 0).then(|| Time(expires.into())),
    }
}

/// The time of the command.
fn second(command: &Command<'_>) -> Time {
    Time(u64::from(command.setting("at", 0)) * 1_000_000)
}

fn request(token_ids: &[u32]) -> RouteRequest<'_> {
    RouteRequest {
        model: "m",
        token_ids,
        max_tokens: 16,
        ..RouteRequest::default()
    }
}

fn refused(error: impl Display) -> String {
    format!("refused: {error}\n")
}

fn answer(changed: bool) -> String {
    if changed {
        String::new()
    } else {
        "nothing to do\n".to_owned()
    }
}

/// The script, each command followed by its answer, indented.
fn play(script: &str) -> String {
    let mut stage = Stage::new();
    let mut transcript = String::new();
    for line in script.lines() {
        writeln!(transcript, "{line}").unwrap();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        for answer in stage.run(&Command::parse(line)).lines() {
            writeln!(transcript, "    {answer}").unwrap();
        }
        stage.scheduler.check_integrity();
    }
    transcript
}

#[test]
fn route() {
    insta::assert_snapshot!(play(include_str!("testdata/scheduler/route.txt")));
}

#[test]
fn assumed() {
    insta::assert_snapshot!(play(include_str!("testdata/scheduler/assumed.txt")));
}

#[test]
fn limits() {
    insta::assert_snapshot!(play(include_str!("testdata/scheduler/limits.txt")));
}

#[test]
fn place() {
    insta::assert_snapshot!(play(include_str!("testdata/scheduler/place.txt")));
}

#[test]
fn place_pipeline() {
    insta::assert_snapshot!(play(include_str!("testdata/scheduler/place_pipeline.txt")));
}

#[test]
fn place_priority() {
    insta::assert_snapshot!(play(include_str!("testdata/scheduler/place_priority.txt")));
}

#[test]
fn place_faults() {
    insta::assert_snapshot!(play(include_str!("testdata/scheduler/place_faults.txt")));
}
