"""The commands of `vmgr`, one module a subject. Nothing else imports them."""
