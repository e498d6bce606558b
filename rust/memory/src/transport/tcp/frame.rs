//! What goes over a connection: a header of 32 bytes, a table of parts, a notification, and bytes of slabs.

use std::{os::fd::BorrowedFd, sync::Arc};

use super::raw::{Moved, PIECES_MAX, Piece, receive_into, send};
use crate::{
    slab::Slab,
    transport::{
        SlabId, TransferId,
        ledger::{NOTIFICATION_BYTES_MAX, SEGMENTS_MAX},
        metadata::Fields,
        spans::{Pair, Span, Spans},
    },
};

const VERSION: u8 = 1;
pub(super) const HEADER_BYTES: usize = 32;
/// A row of the table: slab, offset and length.
const PART_BYTES: usize = 20;
/// What one system call moves at most, so that the lock is free again after it.
const CALL_BYTES_MAX: u64 = 1 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The first frame of a connection: its transfer is the caller's identity, its notification the access key.
    Hello,
    /// Bytes for the parts of the table, and perhaps a notification after them.
    Put,
    /// Asks for the bytes of the parts.
    Get,
    /// A put is where it belongs.
    Done,
    /// A part is not inside a registered slab; nothing of the frame was applied.
    Refused,
    /// The bytes that a get asked for.
    Data,
}

/// A frame's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) has_notification: bool,
    pub(super) notification_len: u32,
    /// Rows of the table.
    pub(super) parts: u32,
    pub(super) transfer: u64,
    /// Bytes of slabs that follow.
    pub(super) payload: u64,
}

impl Header {
    pub(super) const fn of(kind: Kind, transfer: u64) -> Self {
        Self {
            kind,
            has_notification: false,
            notification_len: 0,
            parts: 0,
            transfer,
            payload: 0,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION, self.kind as u8, u8::from(self.has_notification), 0];
        bytes.extend(self.notification_len.to_le_bytes());
        bytes.extend(self.parts.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.transfer.to_le_bytes());
        bytes.extend(self.payload.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u8()? != VERSION {
            return None;
        }
        let kinds = [
            Kind::Hello,
            Kind::Put,
            Kind::Get,
            Kind::Done,
            Kind::Refused,
            Kind::Data,
        ];
        let kind = *kinds.get(usize::from(fields.u8()?))?;
        let has_notification = fields.u8()? != 0;
        fields.u8()?;
        let notification_len = fields.u32()?;
        let parts = fields.u32()?;
        fields.u32()?;
        let header = Self {
            kind,
            has_notification,
            notification_len,
            parts,
            transfer: fields.u64()?,
            payload: fields.u64()?,
        };
        let is_bounded =
            parts as usize <= SEGMENTS_MAX && notification_len as usize <= NOTIFICATION_BYTES_MAX;
        is_bounded.then_some(header)
    }

    /// Bytes between the header and the payload.
    pub(super) const fn table_bytes(&self) -> usize {
        self.parts as usize * PART_BYTES + self.notification_len as usize
    }
}

/// Where parts of a transfer lie in slabs of this process, and how far it has come.
pub(super) struct Cursor {
    parts: Vec<(Arc<Slab>, u64, u64)>,
    at: usize,
    done: u64,
    left: u64,
}

impl Cursor {
    /// The parts must lie inside their slabs.
    pub(super) fn new(parts: Vec<(Arc<Slab>, u64, u64)>) -> Self {
        let left = parts.iter().map(|(_, _, len)| len).sum();
        Self {
            parts,
            at: 0,
            done: 0,
            left,
        }
    }

    pub(super) fn of_spans(spans: &Spans) -> Self {
        let local =
            |(pair, span): (&Pair, &Span)| (Arc::clone(&pair.local), span.local_offset, span.len);
        Self::new(spans.iter().map(local).collect())
    }

    pub(super) const fn left(&self) -> u64 {
        self.left
    }

    pub(super) fn touches(&self, slab: SlabId) -> bool {
        self.parts.iter().any(|(part, _, _)| part.id() == slab)
    }

    /// The next bytes, as one system call takes them.
    fn pieces(&self) -> Vec<Piece<'_>> {
        let mut pieces = Vec::with_capacity(PIECES_MAX);
        let (mut skip, mut room) = (self.done, CALL_BYTES_MAX);
        for (slab, offset, len) in self.parts.iter().skip(self.at).take(PIECES_MAX) {
            let len = room.min(len - skip);
            if len == 0 {
                break;
            }
            pieces.push(Piece {
                slab,
                offset: offset + skip,
                len,
            });
            room -= len;
            skip = 0;
        }
        pieces
    }

    fn advance(&mut self, mut bytes: u64) {
        self.left -= bytes;
        while bytes > 0
            && let Some((_, _, len)) = self.parts.get(self.at)
        {
            let step = bytes.min(len - self.done);
            bytes -= step;
            self.done += step;
            if self.done == *len {
                self.at += 1;
                self.done = 0;
            }
        }
    }

    /// Fills the next bytes from a socket.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> Moved {
        let moved = receive_into(socket, &self.pieces());
        if let Moved::Bytes(bytes) = moved {
            self.advance(bytes as u64);
        }
        moved
    }
}

/// A frame on its way out.
pub(super) struct Outgoing {
    /// None for what is not a transfer of ours.
    pub(super) transfer: Option<TransferId>,
    head: Vec<u8>,
    head_sent: usize,
    body: Option<Cursor>,
}

impl Outgoing {
    /// A frame without parts.
    pub(super) fn short(
        mut header: Header,
        transfer: Option<TransferId>,
        notification: Option<&[u8]>,
    ) -> Self {
        header.has_notification = notification.is_some();
        header.notification_len = notification.map_or(0, <[u8]>::len) as u32;
        let mut head = header.encode();
        head.extend(notification.unwrap_or_default());
        Self {
            transfer,
            head,
            head_sent: 0,
            body: None,
        }
    }

    /// A put or a get: the table of where its parts lie on the other side, and the bytes of a put.
    pub(super) fn transfer(
        kind: Kind,
        id: TransferId,
        spans: &Spans,
        notification: Option<&[u8]>,
    ) -> Self {
        let body = (kind == Kind::Put).then(|| Cursor::of_spans(spans));
        let header = Header {
            kind,
            has_notification: notification.is_some(),
            notification_len: notification.map_or(0, <[u8]>::len) as u32,
            parts: spans.len() as u32,
            transfer: id.0,
            payload: body.as_ref().map_or(0, Cursor::left),
        };
        let mut head = header.encode();
        head.reserve_exact(header.table_bytes());
        for (pair, span) in spans.iter() {
            head.extend(pair.remote.id.0.to_le_bytes());
            head.extend(span.remote_offset.to_le_bytes());
            head.extend(span.len.to_le_bytes());
        }
        head.extend(notification.unwrap_or_default());
        Self {
            transfer: Some(id),
            head,
            head_sent: 0,
            body,
        }
    }

    /// The answer to a get.
    pub(super) fn data(transfer: u64, body: Cursor) -> Self {
        let mut header = Header::of(Kind::Data, transfer);
        header.payload = body.left();
        Self {
            transfer: None,
            head: header.encode(),
            head_sent: 0,
            body: Some(body),
        }
    }

    pub(super) const fn is_started(&self) -> bool {
        self.head_sent > 0
    }

    pub(super) fn is_sent(&self) -> bool {
        self.head_sent == self.head.len() && self.body.as_ref().is_none_or(|body| body.left() == 0)
    }

    pub(super) fn touches(&self, slab: SlabId) -> bool {
        self.body.as_ref().is_some_and(|body| body.touches(slab))
    }

    /// Sends the next bytes; only while it is not all sent.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> Moved {
        let pieces = self.body.as_ref().map(Cursor::pieces).unwrap_or_default();
        let moved = send(socket, &self.head[self.head_sent..], &pieces);
        if let Moved::Bytes(bytes) = moved {
            let of_head = bytes.min(self.head.len() - self.head_sent);
            self.head_sent += of_head;
            if let Some(body) = &mut self.body {
                body.advance((bytes - of_head) as u64);
            }
        }
        moved
    }
}

/// A row of the table: bytes of a slab of whoever reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) slab: SlabId,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The table of a frame that arrived, and its notification.
pub(super) fn read_table(header: &Header, bytes: &[u8]) -> Option<(Vec<Part>, Vec<u8>)> {
    let mut fields = Fields(bytes);
    let parts = (0..header.parts)
        .map(|_| {
            Some(Part {
                slab: SlabId(fields.u32()?),
                offset: fields.u64()?,
                len: fields.u64()?,
            })
        })
        .collect::<Option<_>>()?;
    Some((parts, fields.0.to_vec()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::metadata::KnownSlab;

    fn header() -> Header {
        Header {
            kind: Kind::Data,
            has_notification: true,
            notification_len: 5,
            parts: 3,
            transfer: u64::MAX - 1,
            payload: 1 << 40,
        }
    }

    #[test]
    fn a_header_comes_back() {
        let bytes: [u8; HEADER_BYTES] = header().encode().try_into().unwrap();
        assert_eq!(Header::decode(&bytes), Some(header()));
    }

    #[test]
    fn lengths_beyond_the_limits_are_refused() {
        for (parts, notification_len) in [
            (SEGMENTS_MAX as u32 + 1, 0),
            (0, NOTIFICATION_BYTES_MAX as u32 + 1),
        ] {
            let long = Header {
                notification_len,
                parts,
                ..header()
            };
            assert_eq!(Header::decode(&long.encode().try_into().unwrap()), None);
        }
    }

    #[test]
    fn a_table_comes_back() {
        let slab = Arc::new(
            Slab::create(
                SlabId(4),
                &crate::slab::SlabConfig {
                    len: 2 << 20,
                    ..Default::default()
                },
            )
            .unwrap(),
        );
        let remote = KnownSlab {
            id: SlabId(9),
            base: 0,
            len: 2 << 20,
            tier: crate::Tier::Dram,
        };
        let span = Span {
            local_offset: 3,
            remote_offset: 77,
            len: 1000,
        };
        let mut spans = Spans::default();
        spans.push(&slab, &remote, std::iter::once(span));
        let frame = Outgoing::transfer(Kind::Put, TransferId(6), &spans, Some(b"hi"));
        let header = Header::decode(frame.head[..HEADER_BYTES].try_into().unwrap()).unwrap();
        assert_eq!(header.payload, 1000);
        let table = read_table(&header, &frame.head[HEADER_BYTES..]);
        let part = Part {
            slab: SlabId(9),
            offset: 77,
            len: 1000,
        };
        assert_eq!(table, Some((vec![part], b"hi".to_vec())));
    }

    proptest! {
        #[test]
        fn no_header_is_too_strange(mut bytes: [u8; HEADER_BYTES], known_version: bool) {
            if known_version {
                bytes[0] = VERSION;
            }
            if let Some(header) = Header::decode(&bytes) {
                let again: [u8; HEADER_BYTES] = header.encode().try_into().unwrap();
                prop_assert_eq!(Header::decode(&again), Some(header));
            }
        }
    }
}
