//! What the API tells about itself: `/openapi.json`, made of what stands beside each handler, and a page at `/docs`.

mod document;
mod page;
mod parameters;
mod refusals;
mod schemas;

pub(super) use document::{base, serve, text};
pub(super) use schemas::{
    Beat, Cancellation, Confirmation, InstanceName, Limit, Nothing, ShortMessage, StatusChange, Version,
};
