//! Orders and what is true of them, apart from HTTP, JSON requests and SQL. Values are parsed once; whoever
//! holds an [`OrderId`], a [`Currency`] or an [`Item`] holds a right one.

mod command;
mod event;
mod money;
mod order;
mod text;

pub use command::{Command, Refusal, Update};
pub use event::{Details, Event, EventBody};
pub use money::{Amount, Currency, MAX_PRICE, parse_decimal};
pub(crate) use order::total;
pub use order::{Item, MAX_ITEMS, MAX_QUANTITY, MAX_VERSION, NewOrder, Order, Status};
pub(crate) use text::MAX_ID_BYTES;
pub use text::{
    CustomerId, ItemName, MAX_NAME_CHARS, MAX_NOTES_CHARS, MAX_REASON_CHARS, MenuItemId, Notes, OrderId,
    PaymentId, Reason, RestaurantId, Traceparent,
};
