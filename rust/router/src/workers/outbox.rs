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
/// Messages of other workers that may wait, and bytes in them. What comes then is refused, and its sender told.
const PEER_WAITING_MAX: usize = 256;
const PEER_BYTES_MAX: usize = 8 << 20;

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
    /// Of other workers among them, and the bytes in these.
    num_peer: usize,
    peer_bytes: usize,
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
            num_peer: 0,
            peer_bytes: 0,
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
        let num_waiting = queue.messages.len() - queue.num_peer;
        let has_room = queue.is_open && num_waiting < WAITING_MAX;
        if has_room {
            queue.messages.push_back(message);
            queue.wake();
        }
        has_room
    }

    /// Queues what another worker has to say; `false` where the worker is gone or too much of that waits.
    #[must_use]
    pub(crate) fn push_peer(&self, message: v1::PeerMessage) -> bool {
        let mut queue = self.queue.lock();
        let num_bytes = queue.peer_bytes + message.payload.len();
        let has_room = queue.num_peer < PEER_WAITING_MAX && num_bytes <= PEER_BYTES_MAX;
        if !queue.is_open || !has_room {
            return false;
        }
        queue.num_peer += 1;
        queue.peer_bytes = num_bytes;
        queue.messages.push_back(Message::FromPeer(message));
        queue.wake();
        true
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
            queue.clear();
            queue.wake();
        }
    }
}

impl Queue {
    fn pop(&mut self) -> Option<Message> {
        let message = self.messages.pop_front()?;
        if let Message::FromPeer(message) = &message {
            self.num_peer -= 1;
            self.peer_bytes -= message.payload.len();
        }
        Some(message)
    }

    fn clear(&mut self) {
        self.messages.clear();
        (self.num_peer, self.peer_bytes) = (0, 0);
    }

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
        if let Some(message) = queue.pop() {
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
        queue.clear();
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
    fn messages_of_peers_are_bounded_and_leave_starts_their_room() {
        let peer = |num_bytes: usize| v1::PeerMessage {
            payload: vec![0; num_bytes],
            ..v1::PeerMessage::default()
        };
        let (outbox, mut stream) = Outbox::new();
        for _ in 0..8 {
            assert!(outbox.push_peer(peer(1 << 20)));
        }
        assert!(!outbox.push_peer(peer(1)), "too many bytes");
        for _ in 8..PEER_WAITING_MAX {
            assert!(outbox.push_peer(peer(0)));
        }
        assert!(!outbox.push_peer(peer(0)), "too many messages");
        for sequence_id in 0..WAITING_MAX as u64 {
            assert!(outbox.push(start(sequence_id)));
        }
        assert!(poll(&mut stream).is_ready());
        assert!(
            outbox.push_peer(peer(1 << 20)),
            "what was sent waits no more"
        );
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
