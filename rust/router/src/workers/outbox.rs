//! Messages on their way to one worker.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use futures_core::Stream;
use orchestra_proto::v1::{self, router_message::Message};
use parking_lot::Mutex;
use tonic::Status;

/// Sequence starts that may wait. A worker that lets more pile up is not taking work; the caller tries another.
const WAITING_MAX: usize = 1024;

/// The queue to one worker.
///
/// Starts are refused when it is full. Aborts never are: an abort either takes back a start that still waits here, or
/// belongs to a sequence that runs on the worker, so there are never more of them than running sequences.
#[derive(Debug)]
pub(crate) struct Outbox {
    queue: Mutex<Queue>,
}

#[derive(Debug)]
struct Queue {
    messages: VecDeque<Message>,
    is_open: bool,
    /// What the stream ends with; comes before all that waits.
    end: Option<Status>,
    reader: Option<Waker>,
}

impl Outbox {
    /// An empty queue and its reading end.
    pub(crate) fn new() -> (Arc<Self>, OutboxStream) {
        let queue = Queue {
            messages: VecDeque::new(),
            is_open: true,
            end: None,
            reader: None,
        };
        let outbox = Arc::new(Self {
            queue: Mutex::new(queue),
        });
        (Arc::clone(&outbox), OutboxStream { outbox })
    }

    /// Queues a message; `false` where the worker is gone or too many wait.
    #[must_use]
    pub(crate) fn push(&self, message: Message) -> bool {
        let mut queue = self.queue.lock();
        let has_room = queue.is_open && queue.messages.len() < WAITING_MAX;
        if has_room {
            queue.messages.push_back(message);
            queue.wake();
        }
        has_room
    }

    /// Ends a sequence on the worker, or takes its start back where it was not sent yet.
    pub(crate) fn push_abort(&self, sequence_id: u64) {
        let mut queue = self.queue.lock();
        let is_start = |message: &Message| matches!(message, Message::Start(start) if start.sequence_id == sequence_id);
        if let Some(position) = queue.messages.iter().position(is_start) {
            queue.messages.remove(position);
        } else if queue.is_open {
            queue
                .messages
                .push_back(Message::Abort(v1::AbortSequence { sequence_id }));
            queue.wake();
        }
    }

    /// Ends the stream with `status`, at once. What waits is dropped.
    pub(crate) fn close(&self, status: Status) {
        let mut queue = self.queue.lock();
        if queue.is_open {
            queue.is_open = false;
            queue.end = Some(status);
            queue.messages.clear();
            queue.wake();
        }
    }
}

impl Queue {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// The reading end of an [`Outbox`]; gRPC sends what it yields.
#[derive(Debug)]
pub struct OutboxStream {
    outbox: Arc<Outbox>,
}

impl Stream for OutboxStream {
    type Item = Result<v1::RouterMessage, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut queue = self.outbox.queue.lock();
        if let Some(status) = queue.end.take() {
            return Poll::Ready(Some(Err(status)));
        }
        if let Some(message) = queue.messages.pop_front() {
            return Poll::Ready(Some(Ok(v1::RouterMessage {
                message: Some(message),
            })));
        }
        if !queue.is_open {
            return Poll::Ready(None);
        }
        queue.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for OutboxStream {
    fn drop(&mut self) {
        let mut queue = self.outbox.queue.lock();
        queue.is_open = false;
        queue.messages.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(sequence_id: u64) -> Message {
        Message::Start(v1::StartSequence {
            sequence_id,
            ..v1::StartSequence::default()
        })
    }

    /// What gRPC would send now.
    fn poll(stream: &mut OutboxStream) -> Poll<Option<Result<Message, tonic::Code>>> {
        let sent = Pin::new(stream).poll_next(&mut Context::from_waker(Waker::noop()));
        let message = |sent: v1::RouterMessage| sent.message.unwrap();
        sent.map(|item| item.map(|sent| sent.map(message).map_err(|status| status.code())))
    }

    #[test]
    fn an_abort_takes_back_a_start_that_was_not_sent() {
        let (outbox, mut stream) = Outbox::new();
        assert!(outbox.push(start(1)) && outbox.push(start(2)));
        outbox.push_abort(1);
        assert_eq!(poll(&mut stream), Poll::Ready(Some(Ok(start(2)))));
        assert_eq!(poll(&mut stream), Poll::Pending);
        outbox.push_abort(2);
        let abort = Message::Abort(v1::AbortSequence { sequence_id: 2 });
        assert_eq!(poll(&mut stream), Poll::Ready(Some(Ok(abort))));
    }

    #[test]
    fn starts_are_bounded_and_aborts_are_not() {
        let (outbox, mut stream) = Outbox::new();
        assert!(outbox.push(start(0)));
        assert!(poll(&mut stream).is_ready());
        for sequence_id in 1..=WAITING_MAX as u64 {
            assert!(outbox.push(start(sequence_id)));
        }
        assert!(!outbox.push(start(9999)));
        outbox.push_abort(0);
        let waiting = (0..9999)
            .take_while(|_| poll(&mut stream).is_ready())
            .count();
        assert_eq!(waiting, WAITING_MAX + 1);
    }

    #[test]
    fn closing_overtakes_what_waits() {
        let (outbox, mut stream) = Outbox::new();
        assert!(outbox.push(start(1)));
        outbox.close(Status::aborted("why"));
        assert_eq!(
            poll(&mut stream),
            Poll::Ready(Some(Err(tonic::Code::Aborted)))
        );
        assert_eq!(poll(&mut stream), Poll::Ready(None));
        assert!(!outbox.push(start(2)));
    }

    #[test]
    fn a_gone_reader_closes() {
        let (outbox, stream) = Outbox::new();
        drop(stream);
        assert!(!outbox.push(start(1)));
    }
}
