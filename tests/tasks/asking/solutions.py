"""A function for every question of the code categories that asks for one, read as text and run in the sandbox."""


def double(n: int) -> int:
    return n * 2


def square(n: int) -> int:
    return n * n


def add(a: int, b: int) -> int:
    return a + b


def subtract(a: int, b: int) -> int:
    return a - b


def area(width: float, height: float) -> float:
    return width * height


def is_even(n: int) -> bool:
    return n % 2 == 0


def is_positive(n: int) -> bool:
    return n > 0


def first(items: list[object]) -> object:
    return items[0]


def last(items: list[object]) -> object:
    return items[-1]


def count_characters(text: str) -> int:
    return len(text)


def shout(text: str) -> str:
    return text.upper()


def reverse_text(text: str) -> str:
    return text[::-1]


def greet(name: str) -> str:
    return f"Hello, {name}"


def to_fahrenheit(celsius: float) -> float:
    return celsius * 9 / 5 + 32


def to_minutes(hours: float) -> float:
    return hours * 60


def larger(a: int, b: int) -> int:
    return max(a, b)


def absolute(n: int) -> int:
    return abs(n)


def total(numbers: list[int]) -> int:
    return sum(numbers)


def repeat(text: str, n: int) -> str:
    return text * n


def last_digit(n: int) -> int:
    return n % 10


def average(a: float, b: float) -> float:
    return (a + b) / 2


def remainder(a: int, b: int) -> int:
    return a % b


def join_words(words: list[str]) -> str:
    return " ".join(words)


def has_item(items: list[object], value: object) -> bool:
    return value in items


def half(n: float) -> float:
    return n / 2


def sort_numbers(numbers: list[int]) -> list[int]:
    return sorted(numbers)


def factorial(n: int) -> int:
    return 1 if n < 2 else n * factorial(n - 1)


def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def count_vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)


def is_palindrome(text: str) -> bool:
    return text == text[::-1]


def largest(numbers: list[int]) -> int:
    return max(numbers)


def sum_even(numbers: list[int]) -> int:
    return sum(number for number in numbers if number % 2 == 0)


def is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, n))


def fizzbuzz(n: int) -> str:
    return ("Fizz" * (n % 3 == 0) + "Buzz" * (n % 5 == 0)) or str(n)


def sum_digits(n: int) -> int:
    return sum(map(int, str(n)))


def gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def unique(items: list[object]) -> list[object]:
    return list(dict.fromkeys(items))


def passed(score: int) -> str:
    return "pass" if score >= 50 else "fail"


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def sign(n: int) -> int:
    return (n > 0) - (n < 0)


def remove_spaces(text: str) -> str:
    return text.replace(" ", "")


def longest_word(words: list[str]) -> str:
    return max(words, key=len)


def squares(n: int) -> list[int]:
    return [number * number for number in range(1, n + 1)]


def countdown(n: int) -> list[int]:
    return list(range(n, 0, -1))


def is_leap_year(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def power(base: int, exponent: int) -> int:
    result = 1
    for _ in range(exponent):
        result *= base
    return result


def find(items: list[object], value: object) -> int:
    return items.index(value) if value in items else -1


def count_above(numbers: list[int], limit: int) -> int:
    return sum(number > limit for number in numbers)


def letter_counts(text: str) -> dict[str, int]:
    return {letter: text.count(letter) for letter in text}


def flatten(lists: list[list[object]]) -> list[object]:
    return [item for items in lists for item in items]


def only_positive(numbers: list[int]) -> list[int]:
    return [number for number in numbers if number > 0]
