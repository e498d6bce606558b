//! A streamed answer: one event for each word or some, written when it is due, as engines do.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use super::{
    answer::{Answer, Piece},
    connection::{After, Served, exit, pace_of},
    control::{Fault, Order},
    render::{Render, Usage},
    request::Generation,
};

const HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\nserver: mock-engine\r\ncontent-type: text/event-stream; charset=utf-8\r\n\
    transfer-encoding: chunked\r\n\r\n";

/// When words come, and what goes wrong on the way.
struct Course<'a> {
    render: Render,
    fault: Option<&'a Order>,
    /// Events sent so far, over all choices.
    events: u32,
    /// When the next event is due.
    when: Instant,
    pace: Duration,
}

impl Served {
    /// Streams an answer, up to its end or the fault that was ordered.
    pub(super) async fn stream(
        &mut self,
        mut generation: Generation,
        began: Instant,
        fault: Option<&Order>,
    ) -> io::Result<After> {
        let engine = Arc::clone(&self.engine);
        let config = &engine.config;
        let cached = engine.cache.lock().insert(&generation.prompt);
        let mut course = Course {
            render: Render::new(&generation, &engine, self.number()),
            fault,
            events: 0,
            when: began + config.ttft,
            pace: config.itl,
        };
        self.out.clear();
        self.out.extend_from_slice(HEAD);
        if !config.ttft.is_zero() {
            // The head says that the request was taken; the words come when there are some.
            self.send().await?;
        }
        if self.wait(course.when).await? {
            return Ok(self.gone());
        }
        let mut choices = std::mem::take(&mut generation.choices);
        if generation.is_chat {
            let ids = generation
                .token_ids
                .then(|| generation.prompt_token_ids(&choices));
            for choice in 0..choices.len() {
                self.frame(|out| course.render.role_event(out, choice, ids.as_deref()));
            }
        }
        while choices.iter().any(|choice| !choice.is_over()) {
            if course.events > 0 && self.wait(course.when).await? {
                return Ok(self.gone());
            }
            if let Some(after) = self.step(&mut course, &mut choices).await? {
                return Ok(after);
            }
            course.when += course.pace;
        }
        if generation.include_usage {
            let said = choices.iter().map(|choice| choice.said_tokens() as usize);
            let usage = Usage {
                prompt: generation.prompt_tokens,
                cached,
                completion: said.sum(),
            };
            self.frame(|out| course.render.usage_event(out, usage));
        }
        self.frame(|out| out.extend_from_slice(b"data: [DONE]\n\n"));
        self.out.extend_from_slice(b"0\r\n\r\n");
        self.send().await?;
        Ok(After::Next)
    }

    /// The next event of every choice; what becomes of the connection where the fault came in between.
    async fn step(
        &mut self,
        course: &mut Course<'_>,
        choices: &mut [Answer],
    ) -> io::Result<Option<After>> {
        for (index, choice) in choices.iter_mut().enumerate() {
            let planned = course
                .fault
                .filter(|order| order.after_events == course.events);
            let due = planned.cloned().or_else(|| self.engine.control().strike());
            let fault = due.as_ref().map(|order| order.fault);
            if fault == Some(Fault::Slow) {
                course.pace = pace_of(&self.engine, due.as_ref());
            } else if let Some(fault) = fault
                && let Some(after) = self.break_stream(fault).await?
            {
                return Ok(Some(after));
            }
            let pieces: Vec<Piece> = std::iter::from_fn(|| choice.piece())
                .take(self.engine.config.words_per_event)
                .collect();
            if pieces.is_empty() {
                continue;
            }
            self.words(&course.render, (index, &pieces), fault);
            self.send().await?;
            if fault == Some(Fault::Truncated) {
                return Ok(Some(After::Close));
            }
            course.events += 1;
            let words = &self.engine.control().counters.words;
            words.fetch_add(pieces.len() as u64, Ordering::Relaxed);
        }
        Ok(None)
    }

    /// Appends one event, whole or spoilt.
    fn words(
        &mut self,
        render: &Render,
        (choice, pieces): (usize, &[Piece]),
        fault: Option<Fault>,
    ) {
        self.frame(|out| {
            let before = out.len();
            render.event(out, choice, pieces);
            if matches!(fault, Some(Fault::Garbage | Fault::Truncated)) {
                out.truncate(before + (out.len() - before) / 2);
            }
            if fault == Some(Fault::Garbage) {
                out.extend_from_slice(b"\n\n");
            }
        });
    }

    /// The faults that end a stream between two events.
    async fn break_stream(&mut self, fault: Fault) -> io::Result<Option<After>> {
        self.send().await?;
        Ok(Some(match fault {
            Fault::Reset => After::Reset,
            Fault::Fin => After::Close,
            Fault::Exit => exit(),
            Fault::GarbageChunk => {
                self.connection.write(b"zz\r\n\x00\x01garbage").await?;
                After::Close
            }
            Fault::EarlyEnd => {
                self.connection.write(b"0\r\n\r\n").await?;
                After::Next
            }
            Fault::HangStream => {
                self.connection.closed().await;
                self.gone()
            }
            _ => return Ok(None),
        }))
    }

    /// Appends one chunk with what `write` writes.
    fn frame(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        // Four digits, written after the data: no event of ours is longer.
        let at = self.out.len();
        self.out.extend_from_slice(b"0000\r\n");
        let from = self.out.len();
        write(&mut self.out);
        let size = format!("{:04x}", self.out.len() - from);
        if size.len() == 4 {
            self.out[at..at + 4].copy_from_slice(size.as_bytes());
        } else {
            self.out.splice(at..at + 4, size.bytes());
        }
        self.out.extend_from_slice(b"\r\n");
    }

    async fn send(&mut self) -> io::Result<()> {
        let written = self.connection.write(&self.out).await;
        self.out.clear();
        written
    }
}
