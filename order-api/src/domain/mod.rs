//! Orders and messages and what is true of them, apart from HTTP, JSON requests and SQL. Values are parsed once; whoever
//! holds an [`OrderId`], a [`Currency`] or an [`Item`] holds a right one.

mod command;
mod event;
mod message;
mod money;
mod order;
mod payload;
mod text;

pub use command::{Command, Refusal, Update};
pub use event::{Details, Event, EventBody};
pub use message::{
    Acknowledgement, GroupState, Headers, KafkaName, MAX_ACK_TIMEOUT_SECONDS, MAX_GROUPS, MAX_HEADER_CHARS,
    MAX_HEADERS, Message, MessageState, NewMessage,
};
pub(crate) use message::{MAX_HEADER_NAME_BYTES, MAX_KAFKA_NAME_BYTES};
pub use money::{Amount, Currency, MAX_PRICE, parse_decimal};
pub(crate) use order::total;
pub use order::{Item, MAX_ITEMS, MAX_QUANTITY, MAX_VERSION, NewOrder, Order, Status};
pub use payload::{MAX_NUMBER_DIGITS, MAX_PAYLOAD_BYTES, MAX_PAYLOAD_DEPTH, Payload};
pub(crate) use text::MAX_ID_BYTES;
pub use text::{
    CustomerId, ItemName, MAX_MESSAGE_KEY_CHARS, MAX_NAME_CHARS, MAX_NOTES_CHARS, MAX_REASON_CHARS,
    MenuItemId, MessageKey, Notes, OrderId, PaymentId, Reason, RestaurantId, Traceparent,
};
