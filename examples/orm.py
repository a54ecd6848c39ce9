"""SQLAlchemy over a pool: DATABASE_URL=postgresql://… python examples/orm.py"""

from sqlalchemy import NullPool, String, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import dbpool


class Base(DeclarativeBase):
    """All models."""


class Note(Base):
    """A note."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200))


with dbpool.Pool(close_returns=True) as pool:  # close() gives a connection back
    # NullPool keeps no connections: SQLAlchemy asks dbpool whenever it needs one.
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: pool.getconn(), poolclass=NullPool
    )
    Base.metadata.create_all(engine)

    with Session(engine) as session, session.begin():
        session.add(Note(title="hello"))

    with Session(engine) as session:
        print(session.scalars(select(Note.title)).all())

    print(pool.stats().active, "still checked out")
