//! Runs a script's commands on a scheduler and prints what a person wants to see.

use std::{collections::BTreeMap, fmt::Write as _};

use orchestra_core::{
    BlockHash, HashSeed, RequestId, SamplingParams, Time, TokenId, block_hashes,
    step::{KvEvent, Request, StepOutput, StepPlan, StepScheduler, StepSchedulerConfig},
};

/// `key=value` words.
struct Words<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Words<'a> {
    fn parse(text: &'a str) -> Self {
        let pair = |word: &'a str| {
            word.split_once('=')
                .unwrap_or_else(|| panic!("{word}: no ="))
        };
        Self(text.split_whitespace().map(pair).collect())
    }

    fn get(&self, key: &str) -> Option<u32> {
        let value = self.0.iter().find(|(other, _)| *other == key)?.1;
        Some(value.parse().unwrap_or_else(|_| panic!("{key}={value}")))
    }
}

/// Token of a request at a position. The tokens that requests share have id 0.
fn token_at(id: u32, position: usize) -> TokenId {
    id * 1000 + position as u32
}

/// What the session knows of a request.
struct Known {
    token_ids: Vec<TokenId>,
    hash_seed: HashSeed,
    has_ended: bool,
}

pub(crate) struct Session {
    config: StepSchedulerConfig,
    scheduler: StepScheduler,
    requests: BTreeMap<u32, Known>,
    plan: Option<StepPlan>,
    /// Block ids by slot and column, as the plans have told them.
    block_tables: BTreeMap<(u32, u32), u32>,
}

impl Session {
    pub(crate) fn new(settings: &str) -> Self {
        let words = Words::parse(settings);
        let mut config = StepSchedulerConfig {
            max_model_len: 900,
            max_num_batched_tokens: 64,
            max_num_seqs: 4,
            eos_token_ids: vec![999],
            ..StepSchedulerConfig::default()
        };
        for (key, _) in &words.0 {
            let value = words.get(key).unwrap();
            match *key {
                "block_size" => config.block_size = value,
                "num_blocks" => config.num_blocks = value,
                "max_num_seqs" => config.max_num_seqs = value,
                "budget" => config.max_num_batched_tokens = value,
                "chunk" => config.max_prefill_chunk = value,
                "max_waiting" => config.max_num_waiting = value,
                "max_overtakes" => config.max_overtakes = value,
                "max_prefix_wait" => config.max_prefix_wait_steps = value,
                "host_blocks" => config.num_host_blocks = value,
                "prefix_cache" => config.enable_prefix_cache = value > 0,
                "max_model_len" => config.max_model_len = value,
                _ => panic!("no setting {key}"),
            }
        }
        let scheduler = StepScheduler::new(config.clone()).unwrap();
        Self {
            config,
            scheduler,
            requests: BTreeMap::new(),
            plan: None,
            block_tables: BTreeMap::new(),
        }
    }

    pub(crate) fn run(&mut self, line: &str) -> String {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        let words = Words::parse(rest);
        let printed = match command {
            "add" => self.add(&words),
            "abort" => self.abort(words.get("id").unwrap()),
            "schedule" => self.schedule(),
            "commit" => self.commit(&words),
            "steps" => self.steps(words.get("n").unwrap()),
            "events" => self.events(),
            "stats" => self.stats(),
            _ => panic!("no command {command}"),
        };
        self.scheduler.check_integrity();
        printed
    }

    /// `add id= prompt= [shared=] [max=] [replayed=] [salt=]`: the first `shared` tokens of the prompt are the
    /// same for all requests, the others the request's own.
    fn add(&mut self, words: &Words<'_>) -> String {
        let id = words.get("id").unwrap();
        let get = |key| words.get(key).unwrap_or(0) as usize;
        let (prompt, shared, replayed) = (get("prompt"), get("shared"), get("replayed"));
        let owner = |position| if position < shared { 0 } else { id };
        let mut token_ids: Vec<TokenId> = (0..prompt + replayed)
            .map(|position| token_at(owner(position), position))
            .collect();
        let hash_seed = HashSeed(u64::from(words.get("salt").unwrap_or(0)));
        let known = Known {
            token_ids: token_ids.clone(),
            hash_seed,
            has_ended: false,
        };
        let output_token_ids = token_ids.split_off(prompt);
        let request = Request {
            id: RequestId(u64::from(id)),
            prompt_token_ids: token_ids,
            output_token_ids,
            sampling: SamplingParams {
                max_tokens: words.get("max").unwrap_or(16),
                seed: u64::from(id),
                ..SamplingParams::default()
            },
            hash_seed,
        };
        match self.scheduler.add_request(request, Time::ZERO) {
            Ok(()) => {
                self.requests.insert(id, known);
                String::new()
            }
            Err(reason) => format!("r{id} refused: {reason}\n"),
        }
    }

    fn abort(&mut self, id: u32) -> String {
        let is_found = self.scheduler.abort(RequestId(u64::from(id)));
        if let Some(known) = self.requests.get_mut(&id) {
            known.has_ended = true;
        }
        let stats = self.scheduler.stats();
        let (used, total) = (stats.kv_blocks_used, stats.kv_blocks_total);
        let what = if is_found { "aborted" } else { "not found" };
        format!("r{id} {what}, {used}/{total} blocks used\n")
    }

    fn schedule(&mut self) -> String {
        let Some(plan) = self.scheduler.schedule(Time::ZERO) else {
            return "no plan\n".to_owned();
        };
        for (index, &slot) in plan.update_slots.iter().enumerate() {
            let place = (slot, plan.update_columns[index]);
            self.block_tables.insert(place, plan.update_blocks[index]);
        }
        let mut text = self.heading(&plan);
        for (what, copies) in [("out", &plan.swap_out), ("in", &plan.swap_in)] {
            if !copies.blocks.is_empty() {
                let (blocks, hosts) = (&copies.blocks, &copies.host_blocks);
                let _ = writeln!(text, "  swap {what}: blocks {blocks:?}, host {hosts:?}");
            }
        }
        let mut named = Vec::new();
        let row_texts: Vec<[String; 4]> = (0..plan.context_lens.len())
            .map(|row| self.describe_row(&plan, row, &mut named))
            .collect();
        let width = |column: usize| row_texts.iter().map(|row| row[column].len()).max();
        let widths = [0, 1, 2].map(|column| width(column).unwrap_or(0));
        for [name, work, blocks, rest] in &row_texts {
            let [a, b, c] = widths;
            let line = format!("  {name:a$}  {work:b$}  {blocks:c$}  {rest}");
            let _ = writeln!(text, "{}", line.trim_end());
        }
        self.plan = Some(plan);
        text
    }

    fn heading(&self, plan: &StepPlan) -> String {
        let stats = self.scheduler.stats();
        let (num_tokens, budget) = (plan.token_ids.len(), self.config.max_num_batched_tokens);
        format!(
            "step {}: {num_tokens}/{budget} tokens, {} running, {} waiting, {}/{} blocks used\n",
            plan.step_id,
            stats.num_running,
            stats.num_waiting,
            stats.kv_blocks_used,
            stats.kv_blocks_total,
        )
    }

    /// Who, which positions, which blocks, and whether it starts and draws.
    fn describe_row(&self, plan: &StepPlan, row: usize, named: &mut Vec<u32>) -> [String; 4] {
        let tokens = plan.query_start[row] as usize..plan.query_start[row + 1] as usize;
        let end = plan.context_lens[row] as usize;
        let start = end - tokens.len();
        let id = self.owner(&plan.token_ids[tokens], start, named);
        named.push(id);
        let kind = if end - start == 1 {
            "decode"
        } else {
            "prefill"
        };
        let num_blocks = (end as u32).div_ceil(self.config.block_size);
        let blocks: Vec<String> = (0..num_blocks)
            .map(|column| self.block_tables[&(plan.slots[row], column)].to_string())
            .collect();
        let is_of_row =
            |sample: &&orchestra_core::step::Sample| sample.sequence_index as usize == row;
        let mut rest = Vec::new();
        if let Some(start) = plan
            .starts
            .iter()
            .find(|start| start.sampling.seed == u64::from(id))
        {
            rest.push(format!("starts in slot {}", start.slot));
        }
        if let Some(sample) = plan.samples.iter().find(is_of_row) {
            rest.push(format!("draws {}", sample.position));
        }
        [
            format!("r{id}"),
            format!("{kind} {start}..{end}"),
            format!("blocks {}", blocks.join(" ")),
            rest.join(", "),
        ]
    }

    /// The request that has these tokens there. Where several share them, the first that has no row yet.
    fn owner(&self, token_ids: &[TokenId], start: usize, named: &[u32]) -> u32 {
        let has = |known: &Known| {
            let tail = known.token_ids.get(start..);
            !known.has_ended && tail.is_some_and(|tail| tail.starts_with(token_ids))
        };
        let mut owners = self.requests.iter().filter(|(_, known)| has(known));
        *owners.find(|(id, _)| !named.contains(id)).unwrap().0
    }

    /// `commit [id=token …]`: what those requests draw; the others draw tokens of their own.
    fn commit(&mut self, words: &Words<'_>) -> String {
        let plan = self.plan.take().unwrap();
        let mut output = StepOutput {
            step_id: plan.step_id,
            ..StepOutput::default()
        };
        for sample in &plan.samples {
            let id = sample.request_id.0 as u32;
            let own = token_at(id, sample.position as usize);
            output
                .token_ids
                .push(words.get(&id.to_string()).unwrap_or(own));
        }
        let mut text = String::new();
        for update in self
            .scheduler
            .update_from_output(&output, Time::ZERO)
            .unwrap()
        {
            let id = update.request_id.0 as u32;
            self.requests
                .get_mut(&id)
                .unwrap()
                .token_ids
                .push(update.token_id);
            let _ = write!(
                text,
                "r{id} output[{}] = {}",
                update.output_index, update.token_id
            );
            if update.num_cached_tokens > 0 {
                let _ = write!(
                    text,
                    ", {} prompt tokens were cached",
                    update.num_cached_tokens
                );
            }
            match update.finish_reason {
                Some(reason) => writeln!(text, ", ends: {}", reason.as_str()),
                None => writeln!(text),
            }
            .unwrap();
        }
        if text.is_empty() {
            "nothing drawn\n".to_owned()
        } else {
            text
        }
    }

    /// Steps of which only the headings and endings are shown.
    fn steps(&mut self, n: u32) -> String {
        let mut text = String::new();
        for _ in 0..n {
            let planned = self.schedule();
            text.push_str(planned.lines().next().unwrap_or_default());
            text.push('\n');
            if self.plan.is_none() {
                break;
            }
            let committed = self.commit(&Words::parse(""));
            for line in committed.lines().filter(|line| line.contains("ends")) {
                let _ = writeln!(text, "  {line}");
            }
        }
        text
    }

    /// Blocks are named after the first request that has them: `r2#0` is the first block of request 2.
    fn events(&mut self) -> String {
        let mut names: BTreeMap<BlockHash, String> = BTreeMap::new();
        for (id, known) in &self.requests {
            let hashes = block_hashes(
                known.hash_seed,
                &known.token_ids,
                self.config.block_size as usize,
            );
            for (index, hash) in hashes.into_iter().enumerate() {
                names
                    .entry(hash)
                    .or_insert_with(|| format!("r{id}#{index}"));
            }
        }
        let list = |hashes: &[BlockHash]| {
            hashes
                .iter()
                .map(|hash| names[hash].as_str())
                .collect::<Vec<_>>()
                .join(" ")
        };
        let lines = self
            .scheduler
            .take_kv_events()
            .into_iter()
            .map(|event| match event {
                KvEvent::Stored(hashes) => format!("stored {}\n", list(&hashes)),
                KvEvent::Kept(hashes) => format!("kept {}\n", list(&hashes)),
                KvEvent::Removed(hashes) => format!("removed {}\n", list(&hashes)),
                KvEvent::Cleared => "cleared\n".to_owned(),
            });
        let text: String = lines.collect();
        if text.is_empty() {
            "no events\n".to_owned()
        } else {
            text
        }
    }

    fn stats(&self) -> String {
        let stats = self.scheduler.stats();
        format!(
            "{} running, {} waiting, {}/{} blocks used, {} prefill tokens queued, {} preemptions, \
             {} of {} prompt tokens were cached\n",
            stats.num_running,
            stats.num_waiting,
            stats.kv_blocks_used,
            stats.kv_blocks_total,
            stats.queued_prefill_tokens,
            stats.preemptions,
            stats.prefix_hit_tokens,
            stats.prefix_query_tokens,
        )
    }
}
