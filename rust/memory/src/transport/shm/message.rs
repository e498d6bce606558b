//! What two processes say to each other on the socket of a shared-memory connection: one message, one packet.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};

use crate::transport::{
    SlabId,
    ledger::NOTIFICATION_BYTES_MAX,
    metadata::{AccessKey, Fields, Identity},
};

const VERSION: u8 = 1;
/// The most slabs that one message asks for or brings; the kernel takes at most 253 descriptors.
pub(super) const SLABS_PER_MESSAGE: usize = 64;
/// The longest packet.
const PACKET_BYTES_MAX: usize = NOTIFICATION_BYTES_MAX + 64;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The first one of a connection: who calls, and that it may.
    Hello { caller: Identity, key: AccessKey },
    /// Asks for the descriptors of slabs.
    Want(Vec<SlabId>),
    /// Brings one descriptor for each of these slabs.
    Here(Vec<SlabId>),
    /// These slabs are not registered.
    Missing(Vec<SlabId>),
    /// A notification of the caller.
    Notify(Vec<u8>),
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        match self {
            Self::Hello { caller, key } => {
                bytes.push(1);
                bytes.extend(caller.0.to_le_bytes());
                bytes.extend(key.0);
            }
            Self::Want(slabs) => put_slabs(&mut bytes, 2, slabs),
            Self::Here(slabs) => put_slabs(&mut bytes, 3, slabs),
            Self::Missing(slabs) => put_slabs(&mut bytes, 4, slabs),
            Self::Notify(payload) => {
                bytes.push(5);
                bytes.extend(payload);
            }
        }
        bytes
    }

    pub(super) fn decode(packet: &[u8]) -> Option<Self> {
        let mut fields = Fields(packet);
        if fields.u8()? != VERSION {
            return None;
        }
        let message = match fields.u8()? {
            1 => Self::Hello {
                caller: Identity(fields.u64()?),
                key: AccessKey(fields.array()?),
            },
            2 => Self::Want(take_slabs(&mut fields)?),
            3 => Self::Here(take_slabs(&mut fields)?),
            4 => Self::Missing(take_slabs(&mut fields)?),
            5 => {
                let len = fields.0.len();
                Self::Notify(fields.take(len)?.to_vec())
            }
            _ => return None,
        };
        fields.0.is_empty().then_some(message)
    }
}

fn put_slabs(bytes: &mut Vec<u8>, tag: u8, slabs: &[SlabId]) {
    bytes.push(tag);
    for slab in slabs {
        bytes.extend(slab.0.to_le_bytes());
    }
}

fn take_slabs(fields: &mut Fields<'_>) -> Option<Vec<SlabId>> {
    if fields.0.len() > 4 * SLABS_PER_MESSAGE {
        return None;
    }
    let mut slabs = Vec::new();
    while !fields.0.is_empty() {
        slabs.push(SlabId(fields.u32()?));
    }
    Some(slabs)
}

/// Sends one packet, or none: a full socket is [`Errno::AGAIN`].
pub(super) fn send(
    socket: impl AsFd,
    message: &Message,
    files: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let bytes = message.encode();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(SLABS_PER_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(Errno::MSGSIZE);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags).map(drop)
}

/// What a socket had to say.
pub(super) enum Received {
    Message(Message, Vec<OwnedFd>),
    /// Nothing, for now.
    Nothing,
    /// The other side has closed or died.
    Closed,
    /// Something that is no message of this protocol.
    Malformed,
}

/// Takes one packet off the socket.
pub(super) fn receive(socket: impl AsFd) -> Received {
    let mut bytes = [0; PACKET_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(SLABS_PER_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut take = || {
        recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            flags,
        )
    };
    let received = match take() {
        // The other side closed without reading everything; what it sent before is still there.
        Err(Errno::CONNRESET) => take(),
        received => received,
    };
    let received = match received {
        Ok(received) => received,
        Err(Errno::AGAIN | Errno::INTR) => return Received::Nothing,
        Err(_) => return Received::Closed,
    };
    // Taken out even where the packet is bad: what is dropped here is closed here.
    let files: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Received::Closed;
    }
    match Message::decode(&bytes[..received.bytes]) {
        Some(message) => Received::Message(message, files),
        None => Received::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_message_comes_back() {
        for message in [
            Message::Hello {
                caller: Identity(5),
                key: AccessKey([3; 16]),
            },
            Message::Want(vec![SlabId(1), SlabId(2)]),
            Message::Here(vec![SlabId(7)]),
            Message::Missing(vec![]),
            Message::Notify(b"done".to_vec()),
        ] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
    }

    #[test]
    fn more_slabs_than_one_message_may_name_are_refused() {
        let many = Message::Want(vec![SlabId(0); SLABS_PER_MESSAGE + 1]);
        assert_eq!(Message::decode(&many.encode()), None);
    }

    proptest! {
        #[test]
        fn no_packet_is_too_strange(mut packet in proptest::collection::vec(any::<u8>(), 0..40), known_version: bool) {
            if known_version && !packet.is_empty() {
                packet[0] = VERSION;
            }
            if let Some(message) = Message::decode(&packet) {
                prop_assert_eq!(message.encode(), packet);
            }
        }
    }
}
