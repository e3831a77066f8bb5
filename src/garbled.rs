//! What tests throw at whatever reads from outside: bytes that are nearly right.

use proptest::collection::vec;
use proptest::prelude::*;

/// One of `originals` with a few bytes changed, and perhaps cut short.
pub(crate) fn garbled(originals: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let changes = vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (prop::sample::select(originals), changes, prop::option::of(any::<prop::sample::Index>())).prop_map(
        |(mut bytes, changes, cut)| {
            for (place, byte) in changes {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        },
    )
}
